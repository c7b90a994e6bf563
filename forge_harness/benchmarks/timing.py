"""Times of calls that take turns, so that a slow second of the machine meets all of them."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from forge_harness.scoring.statistics import Interval, paired_median_bounds

Call = Callable[[], object]
ERROR = 0.025
"""One-sided error of the bounds of a ratio."""


@dataclass(slots=True)
class Timed:
    """What one candidate took, round by round.

    Attributes:
        name: Of the candidate.
        calls: Calls in a batch.
        seconds: Seconds a call, one entry a round; rounds of all candidates correspond.
        disturbed: Whether another process took the core during the batch.
    """

    name: str
    calls: int
    seconds: list[float] = field(default_factory=list)
    disturbed: list[bool] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds a call, over the undisturbed rounds where there are three or more."""
        clean = [s for s, bad in zip(self.seconds, self.disturbed, strict=True) if not bad]
        return statistics.median(clean if len(clean) >= 3 else self.seconds)


def samples_of(timed: Mapping[str, Timed]) -> dict[str, list[float]]:
    """Returns the seconds a call of each candidate, round by round."""
    return {name: list(each.seconds) for name, each in timed.items()}


def disturbed_of(timed: Mapping[str, Timed]) -> dict[str, list[bool]]:
    """Returns which rounds of each candidate were disturbed: what medians and ratios leave out."""
    return {name: list(each.disturbed) for name, each in timed.items()}


def interleave(
    candidates: Mapping[str, Call], *, rounds: int = 15, batch: float = 0.004, rest: float = 0.0
) -> dict[str, Timed]:
    """Times candidates in batches that take turns, in rotating order.

    Args:
        candidates: Name -> one call; called often enough to fill a batch.
        rounds: Batches of each.
        batch: Seconds a batch lasts at least.
        rest: Seconds of sleep before a batch, so that another library's idle threads, which spin
            for a while, do not take a core from the next candidate.
    """
    found = {name: Timed(name, _calls(call, batch)) for name, call in candidates.items()}
    names = list(candidates)
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            call, timed = candidates[name], found[name]
            time.sleep(rest)
            switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            start = time.perf_counter()
            for _ in range(timed.calls):
                call()
            timed.seconds.append((time.perf_counter() - start) / timed.calls)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            timed.disturbed.append(after != switches)
    return found


def speedup(faster: Timed, slower: Timed) -> Interval | None:
    """Returns how many times faster one is, with order-statistic bounds over the rounds.

    Rounds in which either was disturbed are left out while six or more stay; None below six.
    """
    pairs = list(zip(slower.seconds, faster.seconds, strict=True))
    bad = [a or b for a, b in zip(slower.disturbed, faster.disturbed, strict=True)]
    clean = [pair for pair, disturbed in zip(pairs, bad, strict=True) if not disturbed]
    chosen: Sequence[tuple[float, float]] = clean if len(clean) >= 6 else pairs
    if len(chosen) < 6:
        return None
    return paired_median_bounds([a for a, _ in chosen], [b for _, b in chosen], error=ERROR)


def _calls(call: Call, batch: float) -> int:
    call()
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    if once < batch:
        # Short calls: the first ones are slower than those of a running batch.
        count = max(1, int(batch / 4 / max(once, 1e-7)))
        start = time.perf_counter()
        for _ in range(count):
            call()
        once = (time.perf_counter() - start) / count
    return max(1, round(batch / max(once, 1e-7)))
