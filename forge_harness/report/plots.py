"""Loss curves as SVG that follows the page's colours and has the same bytes every time."""

from __future__ import annotations

import io
import re
from typing import Any

from markupsafe import Markup

from forge_harness.report.model import QualityTask

SERIES = ("#010101", "#020202", "#030303")
"""Placeholders the style sheet's series colours replace."""
_TEXT, _GRID = "#040404", "#050505"
_COLOURS = {
    **{colour: f"var(--series-{n})" for n, colour in enumerate(SERIES, start=1)},
    _TEXT: "currentColor",
    _GRID: "var(--line)",
}
_DASHES = ("solid", "dashed", "dotted")
"""Curves differ in dash too: colour alone says nothing to one reader in twelve."""
_SETTINGS: Any = {
    "svg.hashsalt": "forge-harness",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "path.simplify": True,
    "text.color": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "grid.color": _GRID,
}


def loss_plot(task: QualityTask, number: int) -> Markup:
    """Returns the loss curves of a task as inline SVG.

    Args:
        task: A task with at least one curve.
        number: Position of the plot in the page; keeps element ids apart.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({**mpl.rcParamsDefault, **_SETTINGS}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        _draw(figure.add_subplot(), task)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return Markup(_inline(buffer.getvalue(), task, f"plot-{number}"))


def _draw(axes: Any, task: QualityTask) -> None:  # noqa: ANN401 - matplotlib has no types here
    for curve, colour, dash in zip(task.curves, SERIES, _DASHES, strict=False):
        # "$" would start mathematics in a label.
        label = curve.arm.replace("$", r"\$")
        axes.plot(curve.steps, curve.losses, color=colour, linestyle=dash, label=label, lw=1.8)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats)")
    axes.grid(visible=True, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)


def _inline(svg: str, task: QualityTask, prefix: str) -> str:
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r' style="([^"]*)"', _as_attributes, body)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = body.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    for colour, variable in _COLOURS.items():
        body = body.replace(colour, variable)
    view = re.search(r'viewBox="[^"]+"', body)
    content = re.sub(r">\s+<", "><", body[body.index(">") + 1 :])
    title, description = _words(task)
    return (
        str(
            Markup(
                '<svg class="plot" {view} role="img" '
                'aria-labelledby="{prefix}-title {prefix}-desc">'
                '<title id="{prefix}-title">{title}</title><desc id="{prefix}-desc">{desc}</desc>'
            ).format(
                view=Markup(view.group() if view else ""),
                prefix=prefix,
                title=title,
                desc=description,
            )
        )
        + content
    )


def _as_attributes(match: re.Match[str]) -> str:
    """Turns a style attribute into presentation attributes: the page's policy allows no styles."""
    parts = [part.partition(":") for part in match.group(1).split(";") if ":" in part]
    # `font` is no presentation attribute; the style sheet sets it.
    kept = ((name.strip(), value.strip()) for name, _, value in parts if name.strip() != "font")
    return "".join(f' {name}="{value}"' for name, value in kept)


def _words(task: QualityTask) -> tuple[str, str]:
    ends = "; ".join(
        f"{c.arm}: from {c.losses[0]:.4g} to {c.losses[-1]:.4g} over {len(c.losses)} points"
        for c in task.curves
    )
    return f"Loss curves of {task.task}", f"Loss in nats over optimizer steps. {ends}."
