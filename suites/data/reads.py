"""Samples read in another order than theirs, against the same samples read one after another."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

DRAWN = 64
"""Samples drawn of a split. A quarter as many come a second time."""

ITEM_SIZES = (1, 2, 4, 8)
"""Bytes of a value."""

Rows = Sequence[bytes]
Read = Callable[[Sequence[int]], Rows]


def reads_of(subject: Any, task: str, split: str) -> dict[str, Read]:
    """What is read of samples, as bytes a sample: contents, inputs and targets."""

    def part(name: str) -> Read:
        return lambda ids: _rows(getattr(subject.batch(task, split, ids), name))

    return {
        "contents": lambda ids: subject.sample_contents(task, split, ids),
        "inputs": part("inputs"),
        "targets": part("targets"),
    }


def misplaced(read: Read, size: int, seed: int) -> tuple[int, int]:
    """Reads one shuffled list with repetitions; counts what is not the sample that was asked for.

    Args:
        read: Of a split.
        size: Of the split.
        seed: Of the list.

    Returns:
        Samples that are another than when read alone, and samples compared: all that are the same
        alone and after the one in front of them. Others are drawn anew, as augmentation does. One
        that is padded to the length of its batch is the same.
    """
    generator = random.Random(seed)
    drawn = generator.sample(range(size), min(size, DRAWN))
    ids = [*drawn, *drawn[: -(-len(drawn) // 4)]]
    generator.shuffle(ids)
    alone = {index: read([index])[0] for index in drawn}
    fixed = {i for i in drawn if _alike(read([max(0, i - 1), i])[-1], alone[i])}
    found = read(ids)
    rows = [*found, *[b""] * len(ids)]
    compared = [(index, row) for index, row in zip(ids, rows, strict=False) if index in fixed]
    return sum(not _alike(row, alone[index]) for index, row in compared), len(compared)


def _alike(row: bytes, alone: bytes) -> bool:
    """Whether a row of a batch is the sample, padded by one value to the length of the batch."""
    more = len(row) - len(alone)
    if more <= 0 or not alone:
        return row == alone
    around = [row[len(alone) :]] if row.startswith(alone) else []
    around += [row[:more]] if row.endswith(alone) else []
    sizes = [size for size in ITEM_SIZES if more % size == 0]
    return any(padding == padding[:size] * (more // size) for padding in around for size in sizes)


def _rows(values: Tensor) -> Rows:
    import torch

    plain = values.cpu().contiguous().reshape(len(values), -1).view(torch.uint8).numpy()
    return [row.tobytes() for row in plain]
