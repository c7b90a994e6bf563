"""Times of calls that take turns, so that a slow second of the machine meets all of them."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from forge_harness.probes.waiting import waited, waits_of_threads
from forge_harness.scoring.statistics import Interval, paired_median_bounds

Call = Callable[[], object]
ERROR = 0.025
"""One-sided error of the bounds of a ratio."""
MEDIAN_ROUNDS = 3
"""Undisturbed rounds of which a median leaves the others out."""
RATIO_ROUNDS = 6
"""Undisturbed pairs of which a ratio leaves the others out; of fewer there are no bounds."""
WAITING = 0.01
"""Of a batch: what its threads may have waited for a core before it counts as disturbed. One switch
to another process costs a call of microseconds everything and a training step nothing."""


@dataclass(slots=True)
class Timed:
    """What one candidate took, round by round.

    Attributes:
        name: Of the candidate.
        calls: Calls in a batch.
        seconds: Seconds a call, one entry a round; rounds of all candidates correspond.
        disturbed: Whether its threads waited for a core for more than `WAITING` of the batch.
        processor: Seconds of processor time a call, of all threads of this process together.
    """

    name: str
    calls: int
    seconds: list[float] = field(default_factory=list)
    disturbed: list[bool] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds a call, over the undisturbed rounds where there are enough.

        Otherwise over all, and void: see `void_of`.
        """
        clean = [s for s, bad in zip(self.seconds, self.disturbed, strict=True) if not bad]
        return statistics.median(clean if len(clean) >= MEDIAN_ROUNDS else self.seconds)


def samples_of(timed: Mapping[str, Timed]) -> dict[str, list[float]]:
    """Returns the seconds a call of each candidate, round by round."""
    return {name: list(each.seconds) for name, each in timed.items()}


def disturbed_of(timed: Mapping[str, Timed]) -> dict[str, list[bool]]:
    """Returns which rounds of each candidate were disturbed: what medians and ratios leave out."""
    return {name: list(each.disturbed) for name, each in timed.items()}


def void_of(timed: Mapping[str, Timed], ratios: Iterable[tuple[str, str]]) -> list[str]:
    """Returns the figures for which too few rounds were undisturbed: they say little.

    Args:
        timed: Candidates.
        ratios: Names (slower, faster) of those that were compared.

    Returns:
        Names of candidates whose median is of disturbed rounds, "slower / faster" of such ratios.
    """
    medians = [name for name, each in timed.items() if each.disturbed.count(False) < MEDIAN_ROUNDS]
    return medians + [
        ratio_name(slower, faster)
        for slower, faster in ratios
        if _clean_pairs(timed[faster], timed[slower]).count(True) < RATIO_ROUNDS
    ]


def ratio_name(slower: str, faster: str) -> str:
    """Returns what `void_of` calls a ratio."""
    return f"{slower} / {faster}"


def in_one_thread(timed: Timed) -> Timed:
    """Returns what a candidate would take at least with one thread, whatever number it used.

    Threads that a library of its own starts know nothing of torch's limit: the work of all of them
    counts, and so does time in which none works.
    """
    seconds = [max(pair) for pair in zip(timed.seconds, timed.processor, strict=True)]
    return dataclasses.replace(timed, seconds=seconds)


def _clean_pairs(a: Timed, b: Timed) -> list[bool]:
    return [not (x or y) for x, y in zip(a.disturbed, b.disturbed, strict=True)]


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
            before, used, start = _Cores(), time.process_time(), time.perf_counter()
            for _ in range(timed.calls):
                call()
            elapsed = time.perf_counter() - start
            timed.seconds.append(elapsed / timed.calls)
            timed.processor.append((time.process_time() - used) / timed.calls)
            timed.disturbed.append(before.were_taken(elapsed))
    return found


def speedup(faster: Timed, slower: Timed) -> Interval | None:
    """Returns how many times faster one is, with order-statistic bounds over the rounds.

    Rounds in which either was disturbed are left out while six or more stay (otherwise the ratio is
    void: see `void_of`); None below six.
    """
    pairs = list(zip(slower.seconds, faster.seconds, strict=True))
    clean = [p for p, ok in zip(pairs, _clean_pairs(faster, slower), strict=True) if ok]
    chosen: Sequence[tuple[float, float]] = clean if len(clean) >= RATIO_ROUNDS else pairs
    if len(chosen) < RATIO_ROUNDS:
        return None
    return paired_median_bounds([a for a, _ in chosen], [b for _, b in chosen], error=ERROR)


class _Cores:
    """What the system counted, when made, of cores that this process wanted and others had."""

    def __init__(self) -> None:
        self._switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        self._waits = waits_of_threads()

    def were_taken(self, elapsed: float) -> bool:
        """Returns whether they were for more than `WAITING` of the `elapsed` seconds since."""
        now = _Cores()
        if self._waits is None or now._waits is None:
            return now._switches != self._switches
        return waited(self._waits, now._waits) > WAITING * elapsed * 1e9


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
