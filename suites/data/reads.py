"""Samples read in another order than theirs, against the same samples read one after another."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

DRAWN = 64
"""Samples drawn of a split. A quarter as many come a second time."""

READ_AGAIN = 20
"""Times the whole list is read where a sample looks misplaced."""

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
        alone and after the one in front of them, or are that one. Others are drawn anew, as
        augmentation does. One that is padded to the length of its batch is the same. Where the
        whole list reads otherwise the next time, so may any sample: then those count that are, byte
        for byte, another one.
    """
    generator = random.Random(seed)
    drawn = generator.sample(range(size), min(size, DRAWN))
    ids = [*drawn, *drawn[: -(-len(drawn) // 4)]]
    generator.shuffle(ids)
    alone = {index: read([index])[0] for index in drawn}
    fixed = {i for i in drawn if _is_fixed(read, i, alone[i])}
    found = read(ids)
    rows = [*found, *[b""] * len(ids)]
    compared = [(index, row) for index, row in zip(ids, rows, strict=False) if index in fixed]
    wrong = [(index, row) for index, row in compared if not _alike(row, alone[index])]
    if wrong and _is_redrawn(read, ids):
        wrong = [(i, row) for i, row in wrong if _is_another(row, i, alone)]
    return len(wrong), len(compared)


def redrawn(read: Read, size: int, seed: int) -> tuple[int, int]:
    """Reads one list twice; returns how many samples are another the second time, and how many."""
    ids = random.Random(seed).sample(range(size), min(size, DRAWN))
    pairs = zip(read(ids), read(ids), strict=False)
    return sum(one != two for one, two in pairs), len(ids)


def _is_fixed(read: Read, index: int, alone: bytes) -> bool:
    """Whether a sample behind the one in front is itself, or that one: neither is drawn anew."""
    front = max(0, index - 1)
    row = read([front, index])[-1]
    return _alike(row, alone) or _alike(row, read([front])[0])


def _is_redrawn(read: Read, ids: Sequence[int]) -> bool:
    """Whether one list reads unequally: what is drawn once in a hundred reads may look fixed."""
    first = list(read(ids))
    return any(list(read(ids)) != first for _ in range(READ_AGAIN))


def _is_another(row: bytes, index: int, alone: Mapping[int, bytes]) -> bool:
    return any(_alike(row, other) for i, other in alone.items() if i != index and other)


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
