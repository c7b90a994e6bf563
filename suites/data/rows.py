"""Rows of inputs as batches hold them, by what is in them but for their padding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1024
"""Samples read at a time: 1 MB of int64 at 128 tokens each."""


class Rows:
    """Digests of rows without what may be padding: batches are padded unequally, on one side.

    Padding is taken to be on the side where rows repeat a value more, both splits together.
    """

    def __init__(self) -> None:
        self.repeated = [0, 0]
        """Values left out at the end, and at the beginning."""
        self._digests: tuple[set[bytes], set[bytes]] = (set(), set())

    def __len__(self) -> int:
        return len(self._digests[0])

    def add(self, row: NDArray[Any], *, padded: bool) -> None:
        """Takes a row into account."""
        for side, whole in enumerate((row, row[::-1])):
            part = unpadded(whole) if padded else whole
            self.repeated[side] += len(whole) - len(part)
            self._digests[side].update(digests([part.tobytes()]))

    def shared(self, other: Rows) -> int:
        """Returns how many rows are in both."""
        end, beginning = (one + two for one, two in zip(self.repeated, other.repeated, strict=True))
        side = int(beginning > end)
        return len(self._digests[side] & other._digests[side])


def digests(contents: Iterable[bytes]) -> list[bytes]:
    """Returns the SHA-256 of each content."""
    return [hashlib.sha256(content).digest() for content in contents]


def unpadded(row: NDArray[Any]) -> NDArray[Any]:
    """Returns a row up to the first of the equal values it ends with.

    The longest of a batch has no padding that could tell where it ends, and stays as it is.
    """
    changes = np.flatnonzero(row != row[-1:])
    return row[: changes[-1] + 2] if len(changes) else row[:1]


def input_rows(
    subject: Any, task: str, split: str, size: int, look: Callable[[Tensor], None]
) -> Rows:
    """Reads the inputs of each sample, as batches hold them; tokens are looked at as well."""
    import torch

    rows = Rows()
    for start in range(0, size, CHUNK):
        ids = range(start, min(start + CHUNK, size))
        inputs = subject.batch(task, split, ids).inputs.cpu().contiguous()
        tokens = inputs.dim() == 2 and not inputs.is_floating_point()
        if tokens:
            look(inputs)
        else:
            inputs = inputs.reshape(len(ids), -1).view(torch.uint8)
        for row in inputs.numpy():
            rows.add(row, padded=tokens)
    return rows
