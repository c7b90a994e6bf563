"""Benchmarks as a table, as JSON and as a plot."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Protocol

import torch

from forge_harness import kernels
from forge_harness.errors import BackendUnavailableError
from forge_harness.model.throughput import CONTENDERS

from . import language_model, training
from .conversion import ConversionRow
from .language_model import Measured
from .products import MOST_SHARE, OPTIONAL, PEERS, Row
from .storage import StorageMeasured
from .timing import ratio_name
from .training import StepsMeasured

SCHEMA = "forge-bench/1"


def table(rows: Sequence[Row]) -> str:
    """Returns a plain table: time, rate, share of the ceiling, times faster than each peer."""
    peers = [*PEERS, *(p for p in OPTIONAL if any(p in row.over for row in rows))]
    head = ["product", "path", "us", "GOP/s", "ceiling", *(f"x {peer}" for peer in peers)]
    lines = [head]
    for row in rows:
        over = [
            _marked(f"{row.over[p][0]:.1f}", row, ratio_name(p, "ours")) if p in row.over else "-"
            for p in peers
        ]
        share = "?" if row.roofline is None else f"{100 * row.roofline:.0f} %"
        ceiling = _marked(f"{share} {row.bound}", row, "ours", f"{row.bound} probe")
        us = _marked(f"{row.microseconds['ours']:.1f}", row, "ours")
        rate = _marked(f"{row.gigaops:.0f}", row, "ours")
        lines.append([row.case.label, row.path, us, rate, ceiling, *over])
    text = _aligned(lines, left=2) + _meaning_of_marks(rows)
    if any(row.roofline is None for row in rows):
        text += (
            f"\n?: more than {100 * MOST_SHARE:.0f} % of the ceiling, so the ceiling's rounds were "
            "disturbed; not measured, run it again on a quiet machine."
        )
    return text


def language_model_table(found: Measured) -> str:
    """Returns tokens a second and times faster than bf16, and how the logits compare."""
    head = ["phase", *CONTENDERS, "packed over bf16"]
    lines = [head]
    for phase in found.phases:
        rates = [
            _marked(f"{phase.tokens_per_second[name]:.0f}", phase, name) for name in CONTENDERS
        ]
        over = phase.over_bf16.get("packed")
        ratio = _marked(_bounded(over), phase, ratio_name(language_model.BASELINE, "packed"))
        lines.append([f"{phase.name} {phase.threads}T, tokens/s", *rates, ratio])
    return "\n".join(
        (
            _aligned(lines, left=1) + _meaning_of_marks(found.phases),
            f"{found.parameters:,} parameters; packed against the model it was packed from: "
            f"largest difference {found.difference:.1e} of the largest logit, same most likely "
            f"token at {100 * found.same_tokens:.1f} % of positions.",
        )
    )


def training_table(found: StepsMeasured) -> str:
    """Returns milliseconds, what a step costs of a full-precision one, and the first losses."""
    lines = [["step", "ms", "tokens/s", "over full", "x torchao", "first loss"]]
    for steps in found.steps:
        for name, milliseconds in steps.milliseconds.items():
            over_full = _bounded(steps.over_full.get(name))
            over_torchao = _bounded(steps.over_torchao.get(name))
            # Of torchao's two arms the one that was compiled as this one was.
            peers = [ratio_name(arm, name) for arm in steps.milliseconds if arm != name]
            lines.append(
                [
                    f"{name} {steps.threads}T",
                    _marked(f"{milliseconds:.1f}", steps, name),
                    _marked(f"{1e3 * found.tokens / milliseconds:.0f}", steps, name),
                    _marked(over_full, steps, ratio_name(name, training.BASELINE)),
                    _marked(over_torchao, steps, *peers),
                    f"{steps.first_loss[name]:.5f}",
                ]
            )
    return "\n".join(
        (
            _aligned(lines, left=1) + _meaning_of_marks(found.steps),
            f"{found.parameters:,} parameters, {found.tokens:,} tokens a step: forward, backward, "
            "clipping and AdamW. over full: time over that of full-precision eager fp32; x: times "
            "faster than torchao, eager or compiled alike; medians of paired rounds.",
        )
    )


def storage_table(found: StorageMeasured) -> str:
    """Returns rates, what they are held against, and how many times longer ours takes."""
    lines = [["what", "ours", "", "against", "theirs", "takes x"]]
    for row in found.rows:
        lines.append(
            [
                row.name,
                _marked(f"{row.rate:,.0f}", row, "ours"),
                row.unit,
                row.baseline,
                _marked(f"{row.baseline_rate:,.0f}", row, "baseline"),
                _marked(_bounded(row.times), row, ratio_name("ours", "baseline")),
            ]
        )
    text = _aligned(lines, left=1) + _meaning_of_marks(found.rows)
    if not (seconds := sorted(found.open_seconds)):
        return text
    return "\n".join(
        (
            text,
            f"A store of {found.states:,} states whose writer went away opens and lists in "
            f"{seconds[len(seconds) // 2]:.3f} s (slowest {seconds[-1]:.3f} s). Files in "
            f"{found.file_system}.",
        )
    )


def conversion_table(rows: Sequence[ConversionRow]) -> str:
    """Returns throughput, and how many times longer than a durable copy each conversion takes."""
    lines = [["to", "", "read MB", "written MB", "MB/s", "copy MB/s", "takes x"]]
    for row in rows:
        both = (row.read_bytes + row.written_bytes) / 1e6
        lines.append(
            [
                row.to,
                "compared" if row.compared else "",
                f"{row.read_bytes / 1e6:,.0f}",
                f"{row.written_bytes / 1e6:,.0f}",
                _marked(f"{both / row.seconds:,.0f}", row, "convert"),
                _marked(f"{both / row.copy_seconds:,.0f}", row, "copy"),
                _marked(_bounded(row.times), row, ratio_name("convert", "copy")),
            ]
        )
    return "\n".join(
        (
            _aligned(lines, left=2) + _meaning_of_marks(rows),
            "copy: reading the source and writing as many bytes as the result, on disk at the end; "
            "MB/s of both.",
        )
    )


def _bounded(ratio: tuple[float, float, float] | None) -> str:
    return "-" if ratio is None else f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"


class _Timed(Protocol):
    """What was timed in rounds: a row, a phase."""

    @property
    def void(self) -> list[str]: ...


def _marked(text: str, timed: _Timed, *names: str) -> str:
    """Returns a figure, marked where it rests on something void: see `timing.void_of`."""
    return f"~{text}" if text != "-" and not set(names).isdisjoint(timed.void) else text


def _meaning_of_marks(rows: Sequence[_Timed]) -> str:
    if not any(row.void for row in rows):
        return ""
    return (
        "\n~: threads waited for a core in so many rounds that disturbed ones count; not "
        "measured, run it again on a quiet machine, with no more threads than it has cores."
    )


def heading(benchmark: str, started: datetime) -> dict[str, Any]:
    """Returns what every benchmark document starts with: schema, times, where it was measured."""
    return {
        "schema_version": SCHEMA,
        "benchmark": benchmark,
        "started_at": started.isoformat(timespec="seconds"),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {
            "harness": version("bitnet-forge-harness"),
            "native": kernels.native_version(),
            "paths": [] if kernels.native_problem() else list(kernels.cpu_paths()),
            "path": _path(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load_average": list(os.getloadavg()),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _path() -> str | None:
    """Returns the instruction set of products that name none; None where none runs."""
    try:
        return kernels.cpu_path()
    except BackendUnavailableError:
        return None


def document(rows: Sequence[Row], *, started: datetime, is_complete: bool = True) -> dict[str, Any]:
    """Returns everything that was measured, raw times included, with where it was.

    Args:
        rows: What was measured.
        started: When.
        is_complete: Whether that is all that was to be measured.
    """
    return {
        **heading("kernels", started),
        "is_complete": is_complete,
        "rows": [
            {
                "tokens": row.case.tokens,
                "rows": row.case.rows,
                "columns": row.case.columns,
                "cold": row.case.cold,
                "threads": row.case.threads,
                "path": row.path,
                "packed_bytes": row.packed_bytes,
                "microseconds": row.microseconds,
                "gigaops": row.gigaops,
                "roofline_share": row.roofline,
                "bound": row.bound,
                "times_faster_than": {
                    peer: {"estimate": e, "low": low, "high": high}
                    for peer, (e, low, high) in row.over.items()
                },
                "probe_multiplications": row.probe_multiplications,
                "seconds_a_call": row.samples,
                "disturbed": row.disturbed,
                "void": row.void,
            }
            for row in rows
        ],
    }


def plot(rows: Sequence[Row]) -> str:
    """Returns an SVG: share of the ceiling of each product, and times faster than the peers.

    What is void is hatched or hollow, a share that was not measured a question mark.
    """
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": SCHEMA, "font.size": 9}):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(11, 0.28 * len(rows) + 1.6), sharey=True, layout="constrained"
        )
        _plot_shares(left, rows)
        _plot_ratios(right, rows)
        left.set_yticks(range(len(rows)), [f"{row.case.label} {row.path}" for row in rows])
        left.set_ylim(len(rows) - 0.5, -0.5)
        if any(row.void for row in rows):
            figure.supxlabel(
                "hatched, hollow: threads waited for a core, not measured", fontsize="small"
            )
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return stream.getvalue()


def _plot_shares(axes: Any, rows: Sequence[Row]) -> None:  # noqa: ANN401 - matplotlib is optional
    for place, row in enumerate(rows):
        if row.roofline is None:
            axes.text(1, place, "?", verticalalignment="center")
            continue
        hatch = "////" if {"ours", f"{row.bound} probe"} & set(row.void) else None
        axes.barh(place, 100 * row.roofline, color="#3b6ea5", edgecolor="white", hatch=hatch)
    axes.axvline(100, color="#888888", linewidth=0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel("share of the nearer ceiling, %")


def _plot_ratios(axes: Any, rows: Sequence[Row]) -> None:  # noqa: ANN401 - as above
    for index, (peer, marker) in enumerate(zip((*PEERS, *OPTIONAL), "osD^vP", strict=True)):
        label: str | None = peer
        for place, row in enumerate(rows):
            if peer not in row.over:
                continue
            hollow = {"markerfacecolor": "none"} if ratio_name(peer, "ours") in row.void else {}
            axes.plot(row.over[peer][0], place, marker, color=f"C{index}", label=label, **hollow)
            label = None
    axes.axvline(1, color="#888888", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times faster than")
    if axes.get_legend_handles_labels()[1]:
        axes.legend()


def _aligned(lines: Sequence[Sequence[str]], *, left: int) -> str:
    """Columns of equal width; the first `left` aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
