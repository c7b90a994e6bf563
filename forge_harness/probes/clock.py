"""The clock that deadlines and durations use, and how noisy timing is on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClockReading:
    """What many successive readings of a clock showed."""

    declared_monotonic: bool
    declared_adjustable: bool
    """Whether setting the wall clock moves it."""
    backward_steps: int
    smallest_step_s: float
    """Smallest positive difference of two successive readings; 0.0 when it never moved."""


def read_clock(
    read: Callable[[], float] = time.monotonic, *, readings: int = 20_000
) -> ClockReading:
    """Reads a clock many times in a row."""
    info = time.get_clock_info("monotonic")
    backward, smallest, previous = 0, float("inf"), read()
    for _ in range(readings):
        now = read()
        if now < previous:
            backward += 1
        elif now > previous:
            smallest = min(smallest, now - previous)
        previous = now
    return ClockReading(
        declared_monotonic=info.monotonic,
        declared_adjustable=info.adjustable,
        backward_steps=backward,
        smallest_step_s=0.0 if smallest == float("inf") else smallest,
    )


def paired_seconds(
    work: Callable[[], object],
    *,
    pairs: int,
    clock: Callable[[], float] = time.process_time,
) -> tuple[list[float], list[float]]:
    """Times the same work twice a pair, interleaved, order alternating: an A/A comparison.

    Args:
        work: Something that takes milliseconds.
        pairs: How many pairs.
        clock: Seconds. Processor time by default, so that a busy neighbour shows only as far
            as it slows the core down.

    Returns:
        Seconds of the first and of the second member of each pair.
    """
    first: list[float] = []
    second: list[float] = []
    for pair in range(pairs):
        order = (first, second) if pair % 2 == 0 else (second, first)
        for timings in order:
            start = clock()
            work()
            timings.append(clock() - start)
    return first, second
