"""Whether the server is ready: a state machine whose every change is told."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class State(StrEnum):
    """What the server is."""

    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    FAILED = "failed"


_NEXT: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.READY, State.DEGRADED, State.DRAINING, State.FAILED}),
    State.READY: frozenset({State.DEGRADED, State.DRAINING, State.FAILED}),
    State.DEGRADED: frozenset({State.READY, State.DRAINING, State.FAILED}),
    # A drained or failed server comes back as another process.
    State.DRAINING: frozenset(),
    State.FAILED: frozenset({State.DRAINING}),
}


class Health:
    """The state of the server, changed by the event loop only.

    Args:
        on_change: Called with the new state and why.
    """

    def __init__(self, on_change: Callable[[State, str], None] | None = None) -> None:
        self.state, self.reason = State.STARTING, "the model is not loaded yet"
        self.on_change = on_change

    @property
    def is_ready(self) -> bool:
        """Whether requests are admitted."""
        return self.state is State.READY

    def become(self, state: State, reason: str = "") -> bool:
        """Changes the state; returns whether it did (a change that is not allowed is ignored)."""
        if state not in _NEXT[self.state]:
            return False
        self.state, self.reason = state, reason
        if self.on_change is not None:
            self.on_change(state, reason)
        return True
