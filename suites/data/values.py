"""Targets that are numbers: of a regression there are no classes, but numbers that were listed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .rows import CHUNK
from .support import labels_of, size_of

PARTS = 10
"""Parts of equal size that the numbers of both splits are divided into, to compare their shares."""


def hold_values(evidence: Any, subject: Any, task: str, split: str) -> None:
    """Holds every target of a split to the listed numbers, which are finite, as its inputs are.

    Training targets that are drawn anew each time they are read (the noise of a denoiser) are held
    to be finite.
    """
    info, size = subject.data_info(task), size_of(subject, task, split)
    listed = columns(labels_of(subject, task, split))
    evidence.equal(
        f"{task}_{split}_listed",
        len(listed),
        expected=size,
        unit="targets",
        reason="targets that LoadsData.labels lists against samples of the split",
    )
    evidence.equal(
        f"{task}_{split}_not_finite",
        int((~np.isfinite(listed)).sum()),
        expected=0,
        unit="targets",
        reason="NaN or infinite among the listed targets",
    )
    dtypes: set[str] = set()
    kinds: set[str] = set()
    bad_inputs = bad = wrong = drawn = 0
    for start in range(0, size, CHUNK):
        ids = range(start, min(start + CHUNK, size))
        batch = subject.batch(task, split, ids)
        dtypes.add(str(batch.inputs.dtype).removeprefix("torch."))
        bad_inputs += int((~torch.isfinite(batch.inputs.double())).sum())
        kinds.add(str(batch.targets.dtype).removeprefix("torch."))
        targets = batch.targets.reshape(len(batch.targets), -1)
        bad += int((~torch.isfinite(targets.double())).sum())
        other = _others(targets, torch.from_numpy(listed[ids.start : ids.stop]))
        if split == "train" and bool(other.any()):
            again = subject.batch(task, split, ids).targets.reshape(len(targets), -1)
            moved = (again != targets).any(1)[other]
            # Not each of them: in half precision one in thousands comes again by chance.
            if 2 * int(moved.sum()) > len(moved):
                drawn += len(moved)
                other = torch.zeros_like(other)
        wrong += int(other.sum())
    count = f"{size} samples read"
    for name, found, expected, reason in (
        ("input_dtype", ", ".join(sorted(dtypes)), info.input_dtype, "delivered against declared"),
        ("bad_inputs", bad_inputs, 0, f"not finite; {count}"),
        ("bad_targets", bad, 0, f"not finite, as {', '.join(sorted(kinds))}; {count}"),
        ("wrong_targets", wrong, 0, f"not the listed target; {count}"),
    ):
        evidence.equal(f"{task}_{split}_{name}", found, expected=expected, reason=reason)
    if drawn:
        evidence.record(
            f"{task}_{split}_drawn_anew",
            drawn,
            unit="targets",
            reason="another number when read again, and finite: there is none to list",
        )


def columns(listed: list[Any]) -> NDArray[np.float64]:
    """Returns listed targets, numbers or rows of them, as a row each."""
    return np.array(listed, np.float64).reshape(len(listed), -1)


def shares(train: list[Any], validation: list[Any]) -> list[tuple[Counter[int], Counter[int]]]:
    """Returns for each number of a target how many of both splits are in each part of its range.

    Parts hold as much of both splits as quantiles can tell; a number that is a border is a part of
    its own, so that zeros or a few levels are seen as they are.
    """
    found = []
    for first, second in zip(columns(train).T, columns(validation).T, strict=True):
        pooled = np.concatenate([first, second])
        known = pooled[np.isfinite(pooled)]
        borders = (
            np.unique(np.quantile(known, np.arange(1, PARTS) / PARTS)) if len(known) else known
        )
        codes = [
            np.searchsorted(borders, part) + np.searchsorted(borders, part, side="right")
            for part in (first, second)
        ]
        found.append((Counter(codes[0].tolist()), Counter(codes[1].tolist())))
    return found


def _others(targets: Tensor, listed: Tensor) -> Tensor:
    """Which samples have another target; a float of fewer digits is the nearest one it has."""
    if targets.shape != listed.shape:
        return torch.ones(len(targets), dtype=torch.bool)
    kept = listed.to(targets.dtype) if targets.is_floating_point() else listed
    return (targets.double() != kept.double()).any(1)
