"""Where a session is in its data: a pure function of seed, epoch and offset."""

from __future__ import annotations

from collections.abc import Sequence

from forge_harness.errors import ForgeError
from forge_harness.training.data import DataSource


class DataPosition:
    """Deals the train samples of one epoch after the other.

    The last batch of an epoch holds what is left, and may be smaller.

    Attributes:
        epoch: Current epoch.
        offset: Samples of it that were dealt.
    """

    def __init__(self, data: DataSource, task: str, seed: int) -> None:
        self.epoch = 0
        self.offset = 0
        self._data = data
        self._task = task
        self._seed = seed
        self._order: Sequence[int] = ()
        self._order_epoch = -1

    def peek(self, size: int) -> tuple[int, ...]:
        """Returns the next at most `size` samples of the epoch without moving."""
        return tuple(self._epoch_order()[self.offset : self.offset + size])

    def advance(self, count: int) -> None:
        """Moves past `count` samples, into the next epoch when this one is dealt."""
        self.offset += count
        if self.offset >= len(self._epoch_order()):
            self.epoch += 1
            self.offset = 0

    def _epoch_order(self) -> Sequence[int]:
        if self._order_epoch != self.epoch:
            self._order = self._data.epoch_order(self._task, seed=self._seed, epoch=self.epoch)
            self._order_epoch = self.epoch
            if not self._order:
                raise ForgeError(f"Epoch {self.epoch} of task {self._task!r} has no samples.")
        return self._order
