"""The highest rate that is served within the objective: doubling, then bisection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

GOODPUT_SHARE = 0.98
"""Of the offered requests, answered correctly and within the objective."""
TIGHT = 1.1
"""The search ends when the bracket is this narrow: a 3 s probe tells no finer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A few seconds at one rate."""

    rate: float
    """Requests a second that were asked for."""
    offered: int
    good: int
    """Answered correctly and within the objective."""
    goodput: float
    """Good answers a second."""
    p95_s: float | None
    """Response time of the accepted; infinite when not answered, None when nothing was accepted."""
    valid: bool
    """Whether the generator kept the schedule."""

    def serves(self, slo_s: float) -> bool:
        """Returns whether the server kept up."""
        return (
            self.offered > 0
            and self.good >= GOODPUT_SHARE * self.offered
            and self.p95_s is not None
            and self.p95_s <= slo_s
        )


Bound = Literal["server", "generator", "time", "limit", "nothing"]
"""What ended the search: the server did not keep up with more; the generator could not send more;
the time was over before the bracket was narrow; the highest rate allowed was served; or not even
the first rate was served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """What the search found."""

    rate: float
    """Highest rate that was served; 0 when none was."""
    above: float | None
    """Lowest rate that was not, or None when every rate tried was."""
    goodput: float
    """Good answers a second at `rate`."""
    bound: Bound
    probes: tuple[Probe, ...] = field(default=())

    @property
    def is_lower_bound(self) -> bool:
        """Whether the server may serve more than `rate` by more than the bracket."""
        return self.bound not in ("server", "nothing")


def search(
    probe: Callable[[float], Probe],
    *,
    start: float,
    slo_s: float,
    cap_s: float,
    probe_s: float,
    clock: Callable[[], float],
    highest: float = 100_000.0,
    tight: float = TIGHT,
) -> Peak:
    """Returns the highest rate that was served.

    Args:
        probe: Loads the server at a rate for `probe_s` and tells how it went.
        start: First rate. When it is not served, the search goes down by halves to 1/s.
        slo_s: Objective of the response time.
        cap_s: Wall clock the whole search may take; no probe starts that would exceed it.
        probe_s: What a probe takes at most.
        clock: Seconds.
        highest: Rate beyond which the search does not go.
        tight: Ratio of the bracket at which it is narrow enough.
    """
    began = clock()
    probes: list[Probe] = []
    served: Probe | None = None
    missed: Probe | None = None
    rate = min(start, highest)
    bound: Bound = "time"
    while clock() - began + probe_s <= cap_s:
        probes.append(found := probe(rate))
        if not found.offered:
            continue  # Nothing was due, so nothing is known; the next schedule is another one.
        if found.valid and found.serves(slo_s):
            served = found if served is None or found.rate > served.rate else served
        else:
            missed = found if missed is None or found.rate < missed.rate else missed
        if served is not None and served.rate >= highest:
            bound = "limit"
            break
        if served is None and rate <= 1.0:
            bound = "nothing" if found.valid else "generator"
            break
        if served and missed and missed.rate <= tight * served.rate:
            bound = "server" if missed.valid else "generator"
            break
        rate = _next_rate(served, missed, highest)
    return Peak(
        rate=served.rate if served else 0.0,
        above=missed.rate if missed else None,
        goodput=served.goodput if served else 0.0,
        bound=bound,
        probes=tuple(probes),
    )


def _next_rate(served: Probe | None, missed: Probe | None, highest: float) -> float:
    if missed is None:
        assert served is not None
        return min(2 * served.rate, highest)
    if served is None:
        return max(missed.rate / 2, 1.0)
    # Rates compare by ratio: the middle is geometric.
    return float((served.rate * missed.rate) ** 0.5)
