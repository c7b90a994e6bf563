"""When requests are due: a Poisson process over phases, fixed by a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of constant arrival rate."""

    name: str
    multiple: float
    """Of the base rate."""
    rate: float
    """Mean arrivals a second."""
    seconds: float


def arrivals(phases: Sequence[Phase], seed: int) -> list[float]:
    """Returns the times at which requests are due, in seconds from the start, ascending.

    The same seed gives the same times on every machine and Python.
    """
    bound = max((phase.rate for phase in phases), default=0.0)
    edges = phase_starts(phases)

    def rate(t: float) -> float:
        return next(p.rate for p, end in zip(phases, edges[1:], strict=True) if t < end)

    return thinned(rate, bound=bound, seconds=edges[-1], rng=random.Random(seed))


def thinned(
    rate: Callable[[float], float], *, bound: float, seconds: float, rng: random.Random
) -> list[float]:
    """Returns the events of an inhomogeneous Poisson process on [0, seconds).

    Candidates of rate `bound` are kept with probability rate(t) / bound. Source: Lewis and
    Shedler, Naval Research Logistics Quarterly 26 (1979).

    Args:
        rate: Events a second at a time, at most `bound` everywhere.
        bound: Rate of the candidates; 0 gives no events.
        seconds: Length of the process.
        rng: Its only source of chance.
    """
    kept: list[float] = []
    t = 0.0
    while bound > 0:
        t -= math.log(1.0 - rng.random()) / bound
        if t >= seconds:
            break
        if rng.random() * bound < rate(t):
            kept.append(t)
    return kept


def phase_starts(phases: Sequence[Phase]) -> list[float]:
    """Returns the start of each phase, and the end of the last one."""
    starts = [0.0]
    for phase in phases:
        starts.append(starts[-1] + phase.seconds)
    return starts


def phase_of(t: float, phases: Sequence[Phase]) -> int:
    """Returns the index of the phase that a time falls in; the last one for times after the end."""
    for index, end in enumerate(phase_starts(phases)[1:]):
        if t < end:
            return index
    return len(phases) - 1


def share(count: int, *, worker: int, of: int) -> range:
    """Returns which of `count` arrivals a worker sends: every `of`-th, so rates divide evenly."""
    return range(worker, count, of)


def choices(count: int, kinds: int, seed: int) -> list[int]:
    """Returns which of `kinds` requests each of `count` arrivals sends, fixed by the seed."""
    rng = random.Random(f"{seed}/requests")
    return [rng.randrange(kinds) for _ in range(count)]
