"""Trainers that own their loop, taken one step at a time.

transformers' Trainer, Lightning's Trainer and most scripts run from `train()` to its end; a
`TrainingSession` makes one step when it is asked for one. `SteppedLoop` holds such a loop in one of
its callbacks until the next step is asked for. It runs on the caller's thread, whose generators,
signals and modes of torch it shares, and on a stack of its own (greenlet).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import greenlet

from forge_harness.errors import ForgeError

T = TypeVar("T")


class LoopEndedError(ForgeError):
    """A loop was to go on, and had ended."""


class SteppedLoop(Generic[T]):
    """A loop that runs until it pauses.

    One that nothing refers to any more is ended where it stands, and its `finally` blocks run.
    What the loop itself refers to is kept as long as it is: a callback that holds the session keeps
    both, and the model, until the process ends.
    """

    def __init__(self, run: Callable[[Callable[[T], None]], object]) -> None:
        """Takes a loop, which begins at the first `advance`.

        Args:
            run: Is called with `pause`, and runs the loop. What it gives to `pause`, in a callback
                at the end of a step for example, is what `advance` returns. It pauses outside of
                `no_grad` and autocast, under which the caller would go on.
        """
        self._loop: Any = greenlet.greenlet(run)
        self._begun = False
        self._end: str | None = None

    def advance(self) -> T:
        """Runs the loop until it pauses, and returns what it paused with.

        Raises:
            LoopEndedError: The loop has returned, or had raised before.
            Exception: What the loop raised: it has ended by that.
        """
        if self._end is not None:
            raise LoopEndedError(self._end)
        # What a greenlet returns or raises goes to its parent: here, not to where it was made.
        self._loop.parent = greenlet.getcurrent()
        given = () if self._begun else (_pause,)
        self._begun = True
        try:
            found: T = self._loop.switch(*given)
        except BaseException as error:
            self._end = (
                f"the training loop ended with {type(error).__name__}: {error}; it must outlive "
                "what a step raises or reports, as the next step is to be made"
            )
            raise
        if self._loop.dead:
            self._end = "the training loop is at its end; let it run for all steps of the options"
            raise LoopEndedError(self._end)
        return found


def _pause(value: object) -> None:
    # No reference to the loop: it could then never be collected.
    greenlet.getcurrent().parent.switch(value)
