"""A load run as evidence of a check, and back: what the report of a run draws it from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .recovery import Window
from .report import LoadReport

SOURCE = "performance.latency_percentiles"
"""The check that records it."""
PHASE_COLUMNS = {
    "offered": "requests/s",
    "goodput": "requests/s",
    "ok": "requests",
    "shed": "requests",
    "failed": "requests",
    "p50": "s",
    "p95": "s",
    "p99": "s",
}
"""Evidence of each phase, with its unit; a percentile only where it was measured."""
_COUNTS = ("offered", "ok", "shed", "failed")
_TIMES = ("p50_s", "p95_s")


@dataclass(frozen=True, slots=True)
class Span:
    """A phase on the axis of time, in seconds from the start."""

    name: str
    start: float
    seconds: float
    problem: str = ""
    """Why it was not the load it was meant to be: what was seen in it is void."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """What the plots of a run show.

    Attributes:
        windows: In order.
        spans: The phases.
        slo_s: Objective of the response time.
    """

    windows: tuple[Window, ...]
    spans: tuple[Span, ...]
    slo_s: float

    @property
    def seconds(self) -> float:
        """End of the last phase."""
        return max(span.start + span.seconds for span in self.spans)


def timeline_of(report: LoadReport) -> Timeline:
    """Returns the timeline of a run."""
    spans = tuple(Span(p.name, p.start, p.seconds, "; ".join(p.problems)) for p in report.phases)
    return Timeline(report.windows, spans, report.plan.slo_s)


class Records(Protocol):
    """The recorder of a check."""

    def record(
        self,
        name: str,
        value: object,
        *,
        unit: str = "1",
        reason: str = "",
        samples: Sequence[float] | None = None,
    ) -> None:
        """Records a value without a limit."""
        ...


def record_timeline(evidence: Records, document: Mapping[str, Any]) -> None:
    """Records phases and windows of a load report's document."""
    evidence.record("load.objective", document["plan"]["slo_s"], unit="s")
    for index, phase in enumerate(document["phases"]):
        span = [phase["start"], phase["seconds"]]
        evidence.record(f"load.{index}.phase", phase["name"], samples=span)
        if phase["problems"]:
            evidence.record(f"load.{index}.void", "; ".join(phase["problems"]))
        for name, value in _phase_values(phase).items():
            evidence.record(f"load.{index}.{name}", value, unit=PHASE_COLUMNS[name])
    windows = document["windows"]
    evidence.record("load.window", len(windows), samples=[w["start"] for w in windows])
    for name in _COUNTS:
        counts = [w[name] for w in windows]
        evidence.record(f"load.window.{name}", sum(counts), unit="requests", samples=counts)
    for name in _TIMES:
        # In a window without an answer there is no time: its place is kept by the other list.
        known = [w for w in windows if w[name] is not None]
        if known:
            times = [w[name] for w in known]
            starts = [w["start"] for w in known]
            evidence.record(f"load.window.{name}", max(times), unit="s", samples=times)
            evidence.record(f"load.window.{name}.at", len(starts), samples=starts)


def _phase_values(phase: Mapping[str, Any]) -> dict[str, float]:
    counts = phase["counts"]
    found = {
        "offered": phase["offered"] / phase["seconds"],
        "goodput": phase["goodput"],
        "ok": counts["ok"],
        "shed": counts["shed"],
        "failed": phase["offered"] - counts["ok"] - counts["shed"],
    }
    measured = (p for p in phase["response"] if p["state"] == "measured")
    return found | {p["name"]: p["value_s"] for p in measured if p["name"] in PHASE_COLUMNS}


class Recorded(Protocol):
    """A row of evidence."""

    @property
    def value(self) -> Any:  # noqa: ANN401 - any scalar
        """The value."""
        ...

    @property
    def samples(self) -> list[float] | None:
        """The values behind it."""
        ...


def timeline_from(rows: Mapping[str, Recorded]) -> Timeline | None:
    """Returns the timeline that evidence holds, by name; None when it holds none, or a part."""
    spans: list[Span] = []
    while (row := rows.get(f"load.{len(spans)}.phase")) is not None and row.samples is not None:
        if len(row.samples) != 2:
            return None
        void = rows.get(f"load.{len(spans)}.void")
        start, seconds = row.samples
        problem = "" if void is None else str(void.value)
        spans.append(Span(str(row.value), start, seconds, problem))
    starts = _samples(rows, "load.window")
    counts = {name: _samples(rows, f"load.window.{name}") for name in _COUNTS}
    objective = rows.get("load.objective")
    is_whole = objective is not None and all(len(c) == len(starts) for c in counts.values())
    if objective is None or not (is_whole and starts and spans):
        return None
    times = {
        name: dict(
            zip(
                _samples(rows, f"load.window.{name}.at"),
                _samples(rows, f"load.window.{name}"),
                strict=False,
            )
        )
        for name in _TIMES
    }
    windows = tuple(
        Window(
            start=start,
            offered=int(counts["offered"][index]),
            ok=int(counts["ok"][index]),
            shed=int(counts["shed"][index]),
            failed=int(counts["failed"][index]),
            p50_s=times["p50_s"].get(start),
            p95_s=times["p95_s"].get(start),
        )
        for index, start in enumerate(starts)
    )
    return Timeline(windows, tuple(spans), float(objective.value))


def _samples(rows: Mapping[str, Recorded], name: str) -> list[float]:
    row = rows.get(name)
    return [] if row is None else row.samples or []
