"""How long a request will wait, from what steps took so far."""

from __future__ import annotations

import math
import time

_WEIGHTS = (0.1, 0.01)
"""Of the newest step in the moving means of the two fits."""


class StepTime:
    """Seconds of a step as a line over its work: fixed + each * work, fitted to recent steps.

    A mean rate would take a server that was idle for one that is slow: a step of one row costs
    nearly what a full one does. Two fits, and the slower one counts: a processor that others share
    is twice as fast for a moment, and a queue filled at that speed misses its deadlines at the next
    one (a fifth of what was admitted at 50 times base load did).

    Args:
        capacity: Most work of one step.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.at = time.monotonic()
        """When it last learned."""
        self._fits = [_Fit(weight) for weight in _WEIGHTS]

    def observe(self, work: int, seconds: float) -> None:
        """Learns from a step. Called by the inference thread only."""
        self.at = time.monotonic()
        for fit in self._fits:
            fit.observe(work, seconds)

    def wait_s(self, ahead: int, own: int, steps: int) -> float:
        """Returns the seconds until a request would be done.

        Args:
            ahead: Work that waits or is being done before it.
            own: Its own work.
            steps: Fewest steps its own work takes.
        """
        total = ahead + own
        rounds = max(steps, math.ceil(total / self.capacity))
        return max(rounds * fixed + total * each for fixed, each in (f.line() for f in self._fits))


class _Fit:
    """A line through steps, older ones weighing less."""

    def __init__(self, weight: float) -> None:
        self._weight, self._steps = weight, 0
        self._work = self._seconds = self._square = self._product = 0.0

    def observe(self, work: int, seconds: float) -> None:
        self._steps += 1
        # The plain mean until there are enough, or the first step would weigh for long.
        share = max(self._weight, 1 / self._steps)
        self._work += share * (work - self._work)
        self._seconds += share * (seconds - self._seconds)
        self._square += share * (work * work - self._square)
        self._product += share * (work * seconds - self._product)

    def line(self) -> tuple[float, float]:
        """Returns (fixed, each) in seconds; both 0 before the first step."""
        spread = self._square - self._work**2
        each = 0.0
        if spread > 1e-9 * max(1.0, self._square):
            each = max(0.0, (self._product - self._work * self._seconds) / spread)
        fixed = self._seconds - each * self._work
        if fixed < 0:
            return 0.0, self._seconds / max(self._work, 1e-9)
        return fixed, each
