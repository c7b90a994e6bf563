"""Half-second windows of a run, and when the server was itself again after an overload."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .percentiles import nearest_rank
from .records import Fate, Record

WINDOW_S = 0.5
_MIN_EXPECTED = 7.0
"""Arrivals a window must hold on average: with fewer, empty ones (over 0.1 %) mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What became of the requests that were due in a window."""

    start: float
    offered: int
    ok: int
    shed: int
    failed: int
    """Errors, timeouts, dropped and censored."""
    p50_s: float | None
    """Response time of what was accepted, infinite when not answered; None when nothing was."""
    p95_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """When every later window was good again."""

    seconds: float | None
    """From the drop of the load; None when it did not happen, or could not be told."""
    watched_s: float
    """How long the base load was watched after the drop."""
    limit_s: float
    """p95 that counts as recovered."""
    problem: str = ""
    """Why it could not be told."""

    @property
    def measured(self) -> bool:
        """Whether the windows could be judged at all."""
        return not self.problem


def windows(
    records: Sequence[Record], start: float, end: float, width: float = WINDOW_S
) -> tuple[Window, ...]:
    """Returns the whole windows between two times; requests belong where they were due.

    Args:
        records: By due time, ascending.
        start: Of the first window, in seconds.
        end: After the last window; a part of a window at the end is left out.
        width: Of a window, in seconds.
    """
    count = math.floor((end - start) / width + 1e-9)
    parts: list[list[Record]] = [[] for _ in range(count)]
    for record in records:
        index = math.floor((record.intended - start) / width)
        if 0 <= index < count:
            parts[index].append(record)
    return tuple(_window(part, start + i * width) for i, part in enumerate(parts))


def _window(records: Sequence[Record], start: float) -> Window:
    ok = sum(record.fate is Fate.OK for record in records)
    shed = sum(record.fate is Fate.SHED for record in records)
    accepted = sorted(r.response_s for r in records if r.fate is not Fate.SHED)
    return Window(
        start=start,
        offered=len(records),
        ok=ok,
        shed=shed,
        failed=len(records) - ok - shed,
        p50_s=accepted[nearest_rank(len(accepted), 0.50) - 1] if accepted else None,
        p95_s=accepted[nearest_rank(len(accepted), 0.95) - 1] if accepted else None,
    )


def recovery(
    records: Sequence[Record],
    *,
    drop: float,
    end: float,
    rate: float,
    baseline_p95: float | None,
    slo_s: float,
) -> Recovery:
    """Returns the time from the drop of the load to the first of only good windows.

    A window is good when requests were due in it, none failed or was shed, and their p95 is at
    most twice the baseline's or the objective, whichever is more. An empty window is not good:
    nobody knows.

    Args:
        records: By due time, ascending.
        drop: When the load went back to the base rate, in seconds.
        end: Of the base load after it.
        rate: Of that load, arrivals a second.
        baseline_p95: Before the overload, in seconds; None when it was not measured. Infinite (no
            answers) it is no measure of health, and the objective alone counts.
        slo_s: The objective of the response time.
    """
    baseline = baseline_p95 or 0.0
    limit = max(2 * baseline, slo_s) if math.isfinite(baseline) else slo_s
    parts = windows(records, drop, end)
    problem = ""
    if rate * WINDOW_S < _MIN_EXPECTED:
        problem = (
            f"the base rate of {rate:.3g}/s leaves windows of {WINDOW_S:g} s empty; "
            f"{_MIN_EXPECTED / WINDOW_S:g}/s are enough"
        )
    elif not parts:
        problem = "no base load after the overload"
    seconds: float | None = None
    if not problem:
        for window in reversed(parts):
            if not is_good(window, limit):
                break
            seconds = window.start - drop
    return Recovery(seconds=seconds, watched_s=end - drop, limit_s=limit, problem=problem)


def worst(found: Iterable[Recovery]) -> Recovery | None:
    """Returns the one that never ended, else one that could not be told, else the longest."""
    return max(
        found,
        key=lambda r: (r.measured and r.seconds is None, not r.measured, r.seconds or 0.0),
        default=None,
    )


def is_good(window: Window, limit_s: float) -> bool:
    """Returns whether everything due in a window was answered well."""
    return (
        window.offered > 0
        and window.failed == 0
        and window.shed == 0
        and window.p95_s is not None
        and window.p95_s <= limit_s
    )
