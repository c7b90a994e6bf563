"""Inputs as batches hold them: their values in both splits, and text against its contents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_VALUES = 1 << 20
"""Values looked at of one batch, as whole rows, and distinct ones kept of a split."""
ONCE = 0.01
"""Share of training values that come once, up to which the values make an alphabet. By Good and
Turing it is the share of new values that as many further draws from the same source hold."""
NEW = 0.10
"""Ten times as many. Of the digits 0.20 are new when halved, 0.24 when doubled, 0.42 and more when
not scaled or scaled by 15 for 16, 0.91 when standardized by their own split; 0 as they are."""
SPARED = 10
"""One feature in so many, and two at least, may have new values: a year, a serial number."""
SHIFTS = (0, 1, 2, -1, -2)
"""Places by which tokens may come late, or early, against the bytes they stand for."""
EVIDENT = 0.25
"""Share of tokens equal to their byte from which on tokens are bytes: upper-casing code leaves 0.4;
another numbering of characters leaves next to none."""


class Alphabet:
    """The distinct values of float inputs, with how often each comes."""

    def __init__(self) -> None:
        self.values = torch.empty(0, dtype=torch.float64)
        self.counts = torch.empty(0, dtype=torch.int64)

    def see(self, inputs: Tensor) -> None:
        """Takes the rows of a batch into account, unless there are too many values already."""
        if len(self.values) > MOST_VALUES or not inputs.numel():
            return
        seen = inputs[: self._rows(inputs)].double().flatten()
        values, counts = seen[seen.isfinite()].unique(return_counts=True)
        self.values, places = torch.cat([self.values, values]).unique(return_inverse=True)
        counts = torch.cat([self.counts, counts])
        self.counts = torch.zeros(len(self.values), dtype=torch.int64).index_add(0, places, counts)

    def exists(self) -> bool:
        """Whether hardly a value was seen once: others of the same source are then among these."""
        return bool(len(self.counts)) and int((self.counts == 1).sum()) <= ONCE * int(
            self.counts.sum()
        )

    def strangers(self, inputs: Tensor) -> Tensor:
        """Returns for each value of a batch whether it is none of these: bool (rows, features)."""
        return ~torch.isin(inputs[: self._rows(inputs)].double().flatten(1), self.values)

    def _rows(self, inputs: Tensor) -> int:
        return max(1, MOST_VALUES // max(1, inputs[0].numel()))


def new_share(strangers: Sequence[Tensor]) -> float:
    """Returns the share of new values, the features that have most of them spared."""
    by_feature = torch.cat(list(strangers)).double().mean(0).sort().values
    kept = by_feature[: len(by_feature) - max(2, len(by_feature) // SPARED)]
    return float(kept.mean()) if len(kept) else 0.0


def lateness(inputs: Tensor, contents: Sequence[bytes]) -> int | None:
    """Returns by how many places tokens come after their bytes.

    None where tokens are no bytes of the contents: another numbering, or another length.
    """
    tokens = inputs.flatten(1)
    length = tokens.shape[1]
    if len(contents) != len(tokens) or any(len(content) < length for content in contents):
        return None
    read = torch.tensor([list(content[:length]) for content in contents])
    shares = {shift: _share(tokens, read, shift) for shift in SHIFTS if abs(shift) < length}
    best = max(shares, key=lambda shift: shares[shift])
    return best if shares[best] >= EVIDENT else None


def unlike(inputs: Tensor, contents: Sequence[bytes]) -> int:
    """Returns how many rows of tokens are not the bytes their content begins with."""
    narrow = inputs.to(torch.uint8)
    outside = (narrow != inputs).flatten(1).any(1).tolist()
    rows = (row.numpy().tobytes() for row in narrow)
    pairs = zip(rows, outside, contents, strict=False)
    return sum(wrong or row != bytes(content[: len(row)]) for row, wrong, content in pairs)


def _share(tokens: Tensor, read: Tensor, shift: int) -> float:
    """The share of tokens equal to the byte `shift` places before them."""
    length = tokens.shape[1]
    late, early = max(0, shift), max(0, -shift)
    same = tokens[:, late : length - early] == read[:, early : length - late]
    return float(same.double().mean())
