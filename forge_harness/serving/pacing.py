"""The event loop's share of the interpreter while requests are refused."""

from __future__ import annotations

import asyncio
import time

PAUSE_S = 0.003
"""Between two turns of the event loop under overload. Readers that come meanwhile are served in one
turn: each turn of its own would take the interpreter from the inference thread for one refusal."""
HOLD_S = 0.05
"""After the last refusal."""


class Pacer:
    """Makes the event loop rest between its turns as long as requests are refused for overload.

    The loop and the inference thread share one interpreter. A refusal is short, but each wakes the
    loop by itself, and at 1,700 refusals a second the thread got a third less done than at peak.
    """

    def __init__(self) -> None:
        self._until = 0.0
        self._is_pacing = False

    @property
    def is_pacing(self) -> bool:
        """Whether the loop rests now and then."""
        return self._is_pacing

    def refused(self) -> None:
        """Begins to pace, or goes on. Called in the event loop for each refusal."""
        self._until = time.monotonic() + HOLD_S
        if not self._is_pacing:
            self._is_pacing = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        if time.monotonic() >= self._until:
            self._is_pacing = False
            return
        # Blocking on purpose: it gives the interpreter away, and lets arrivals gather.
        time.sleep(PAUSE_S)
        asyncio.get_running_loop().call_soon(self._turn)
