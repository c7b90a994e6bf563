"""A load run over time: latency, offered against served, shed and failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from forge_harness.load.recovery import WINDOW_S
from forge_harness.load.timeline import Timeline
from forge_harness.report.figures import DASHES, GRID, SERIES, TEXT, figure, plot_line

Line = tuple[str, Sequence[float]]


def load_plots(timeline: Timeline, prefix: str = "load") -> dict[str, Markup]:
    """Returns the plots of a run as inline SVG, by name: latency, throughput, refused.

    Args:
        timeline: A run with at least one window.
        prefix: Keeps element ids apart when a page shows several runs.
    """
    windows = timeline.windows
    p95 = [_plottable(w.p95_s) for w in windows]
    p50 = [_plottable(w.p50_s) for w in windows]
    rate = 1 / WINDOW_S
    latency: list[Line] = [("p95", p95), ("median", p50)]
    served: list[Line] = [
        ("offered", [w.offered * rate for w in windows]),
        ("answered right", [w.ok * rate for w in windows]),
    ]
    refused: list[Line] = [
        ("shed", [w.shed * rate for w in windows]),
        ("failed", [w.failed * rate for w in windows]),
    ]
    return {
        "latency": _plot(
            timeline, latency, f"{prefix}-latency", "Response time", "ms, of accepted", log=True
        ),
        "throughput": _plot(
            timeline,
            served,
            f"{prefix}-throughput",
            "Offered and answered right",
            "requests a second",
        ),
        "refused": _plot(
            timeline, refused, f"{prefix}-refused", "Shed and failed", "requests a second"
        ),
    }


def _plottable(seconds: float | None) -> float:
    """Milliseconds; a gap where there is no answer: the plot of failures shows those."""
    return 1000 * seconds if seconds is not None and math.isfinite(seconds) else math.nan


def _plot(
    timeline: Timeline,
    lines: Sequence[Line],
    prefix: str,
    title: str,
    unit: str,
    *,
    log: bool = False,
) -> Markup:
    middles = [window.start + WINDOW_S / 2 for window in timeline.windows]

    def draw(axes: Any) -> None:  # noqa: ANN401 - matplotlib has no types here
        for (label, values), colour, dash in zip(lines, SERIES, DASHES, strict=False):
            plot_line(axes, middles, values, color=colour, linestyle=dash, label=label, lw=1.6)
        if log:
            axes.set_yscale("log")
            limit = 1000 * timeline.slo_s
            axes.axhline(limit, color=SERIES[2], linestyle="dotted", lw=1.2, label="objective")
        else:
            highest = max((value for _, values in lines for value in values), default=0.0)
            axes.set_ylim(0, max(1.0, 1.05 * highest))
        _mark_phases(axes, timeline)
        axes.set_title(title, loc="left", fontsize=10, pad=18)
        axes.set_xlabel("seconds from the start")
        axes.set_ylabel(unit)
        axes.legend(frameon=False, loc="best")

    return figure(
        draw,
        prefix=prefix,
        title=f"{title} over time",
        description=f"Windows of {WINDOW_S:g} s, {unit}. {_words(lines)}{_void(timeline)}",
        height=2.9,
    )


def _mark_phases(axes: Any, timeline: Timeline) -> None:  # noqa: ANN401
    for phase in timeline.spans:
        axes.axvline(phase.start, color=GRID, lw=1)
        if phase.problem:
            end = phase.start + phase.seconds
            axes.axvspan(phase.start, end, fill=False, hatch="///", edgecolor=GRID, linewidth=0)
        axes.annotate(
            f"{phase.name} void" if phase.problem else phase.name,
            (phase.start + phase.seconds / 2, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=9,
            color=TEXT,
        )
    axes.set_xlim(0, timeline.seconds)


def _void(timeline: Timeline) -> str:
    void = [f" Void: {phase.name}, {phase.problem}." for phase in timeline.spans if phase.problem]
    return "".join(void)


def _words(lines: Sequence[Line]) -> str:
    said = []
    for label, values in lines:
        known = [value for value in values if not math.isnan(value)]
        if known:
            said.append(f"{label}: from {min(known):.4g} to {max(known):.4g}")
    return "; ".join(said) + "."
