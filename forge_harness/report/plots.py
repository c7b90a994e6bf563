"""Loss curves of the report."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from forge_harness.report.figures import DASHES, SERIES, drawable, figure, plot_line
from forge_harness.report.model import QualityTask


def loss_plot(task: QualityTask, number: int) -> Markup:
    """Returns the loss curves of a task as inline SVG.

    Args:
        task: A task with at least one curve.
        number: Position of the plot in the page; keeps element ids apart.
    """
    title, description = _words(task)

    def draw(axes: Any) -> None:  # noqa: ANN401 - matplotlib has no types here
        _draw(axes, task)

    return figure(draw, prefix=f"plot-{number}", title=title, description=description)


def _draw(axes: Any, task: QualityTask) -> None:  # noqa: ANN401
    for curve, colour, dash in zip(task.curves, SERIES, DASHES, strict=False):
        # "$" would start mathematics in a label.
        label = curve.arm.replace("$", r"\$")
        steps, losses = drawable(curve.steps), drawable(curve.losses)
        plot_line(axes, steps, losses, color=colour, linestyle=dash, label=label, lw=1.8)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats)")
    axes.legend(frameon=False)


def _words(task: QualityTask) -> tuple[str, str]:
    ends = "; ".join(
        f"{c.arm}: from {c.losses[0]:.4g} to {c.losses[-1]:.4g} over {len(c.losses)} points"
        for c in task.curves
    )
    return f"Loss curves of {task.task}", f"Loss in nats over optimizer steps. {ends}."
