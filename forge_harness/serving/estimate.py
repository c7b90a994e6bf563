"""How long a request will wait, from what steps took so far."""

from __future__ import annotations

import math

_WEIGHT = 0.1
"""Of the newest step in the moving means."""


class StepTime:
    """Seconds of a step as a line over its work: fixed + each * work, fitted to recent steps.

    A mean rate would take a server that was idle for one that is slow: a step of one row costs
    nearly what a full one does.

    Args:
        capacity: Most work of one step.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._known = False
        self._work = self._seconds = self._square = self._product = 0.0

    def observe(self, work: int, seconds: float) -> None:
        """Learns from a step. Called by the inference thread only."""
        share = _WEIGHT if self._known else 1.0
        self._work += share * (work - self._work)
        self._seconds += share * (seconds - self._seconds)
        self._square += share * (work * work - self._square)
        self._product += share * (work * seconds - self._product)
        self._known = True

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

    def wait_s(self, ahead: int, own: int, steps: int) -> float:
        """Returns the seconds until a request would be done.

        Args:
            ahead: Work that waits or is being done before it.
            own: Its own work.
            steps: Fewest steps its own work takes.
        """
        fixed, each = self.line()
        total = ahead + own
        return max(steps, math.ceil(total / self.capacity)) * fixed + total * each
