"""Plots as SVG that follows the page's colours and has the same bytes every time."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from markupsafe import Markup

SERIES = ("#010101", "#020202", "#030303")
"""Placeholders the style sheet's series colours replace."""
TEXT, GRID = "#040404", "#050505"
DASHES = ("solid", "dashed", "dotted")
"""Curves differ in dash too: colour alone says nothing to one reader in twelve."""
_COLOURS = {
    **{colour: f"var(--series-{n})" for n, colour in enumerate(SERIES, start=1)},
    TEXT: "currentColor",
    GRID: "var(--line)",
}
_SETTINGS: Any = {
    "svg.hashsalt": "forge-harness",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "path.simplify": True,
    "text.color": TEXT,
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": GRID,
}
_ALONE = (
    ":root{color-scheme:light dark;color:#1f2328;--line:#d1d9e0;--series-1:#0757b8;"
    "--series-2:#b35900;--series-3:#116329}"
    "@media(prefers-color-scheme:dark){:root{color:#e6edf3;--line:#3d444d;--series-1:#79b8ff;"
    "--series-2:#ffa657;--series-3:#56d364}}"
    "text{font:10px system-ui,'DejaVu Sans',sans-serif}"
)
"""The page's colours, for a plot in a file of its own."""

Draw = Callable[[Any], None]
_MOST_DRAWN = 1e100
"""Matplotlib cannot lay out an axis whose length is no finite number."""


def drawable(values: Iterable[float]) -> list[float]:
    """Returns what can be drawn of a series: a gap where a value is beyond every axis."""
    return [value if abs(value) <= _MOST_DRAWN else math.nan for value in values]


def plot_line(
    axes: Any,  # noqa: ANN401 - matplotlib has no types here
    xs: Sequence[float],
    ys: Sequence[float],
    **style: Any,  # noqa: ANN401
) -> None:
    """Draws a series as a line, and a point that stands between two gaps as a dot."""
    if lonely := _lonely(xs, ys):
        style |= {"marker": "o", "markersize": 3.5, "markevery": lonely}
    axes.plot(xs, ys, **style)


def _lonely(xs: Sequence[float], ys: Sequence[float]) -> list[int]:
    """Returns the places no line leads to: of one point alone nothing would be seen."""
    known = [math.isfinite(x) and math.isfinite(y) for x, y in zip(xs, ys, strict=True)]
    sides = zip([False, *known], known, [*known[1:], False], strict=False)
    return [i for i, (before, here, after) in enumerate(sides) if here and not (before or after)]


def figure(draw: Draw, *, prefix: str, title: str, description: str, height: float = 3.2) -> Markup:
    """Returns a plot as inline SVG.

    Args:
        draw: Draws on the axes it is given, with the colours SERIES, TEXT and GRID.
        prefix: Keeps element ids of several plots of a page apart.
        title: What the plot shows, for readers who do not see it.
        description: Its content in words, likewise.
        height: In inches; the width is 7.2.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({**mpl.rcParamsDefault, **_SETTINGS}):
        page = Figure(figsize=(7.2, height), layout="constrained")
        axes = page.add_subplot()
        draw(axes)
        axes.grid(visible=True, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        page.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return Markup(_inline(buffer.getvalue(), prefix, title, description))


def standalone(svg: Markup) -> str:
    """Returns an inline plot as a file of its own, in the page's colours, light or dark."""
    start, rest = str(svg).split(">", 1)
    start = start.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{start}><style>{_ALONE}</style>{rest}\n"


def _inline(svg: str, prefix: str, title: str, description: str) -> str:
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
