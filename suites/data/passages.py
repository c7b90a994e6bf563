"""Passages of held-out text that occur in training: windows that overlap over the split."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

PASSAGE = 40
"""Tokens of a passage: a line of as many characters is taken to identify its source too."""
ONE_IN = 16
"""Passages looked at, chosen by what is in them, so that both splits choose the same ones."""
KNOWN = 0.25
"""Share of its passages from which on a sample is known from training: a window of 128 has 0.29 of
them in one that overlaps it by half."""
LEAK = 0.25
"""Share of known samples that is a leak: 0.07 of the reference's are, by what all code has in
common, and 0.83 and more of windows that overlap by half."""
_MIX = 0x9E3779B97F4A7C15

Hashes = NDArray[np.uint64]


class Passages:
    """Passages of the held-out samples, and which of them training has."""

    def __init__(self) -> None:
        self._samples: list[Hashes] = []
        self._seen: dict[int, bool] = {}

    def hold(self, inputs: Tensor) -> None:
        """Takes tokens of held-out samples, int (samples, length)."""
        hashes, chosen = _chosen(inputs)
        samples = (np.unique(row[mask]) for row, mask in zip(hashes, chosen, strict=True))
        self._samples += [sample for sample in samples if len(sample)]
        self._seen |= dict.fromkeys(hashes[chosen].tolist(), False)

    def see(self, inputs: Tensor) -> None:
        """Takes tokens of training samples; none is kept."""
        hashes, chosen = _chosen(inputs)
        for passage in self._seen.keys() & set(hashes[chosen].tolist()):
            self._seen[passage] = True

    def known(self) -> float:
        """Returns the share of held-out samples, of those with a passage, known from training."""
        shares = [np.mean([self._seen[p] for p in sample.tolist()]) for sample in self._samples]
        return float(np.mean([share > KNOWN for share in shares])) if shares else 0.0


def _chosen(inputs: Tensor) -> tuple[Hashes, NDArray[np.bool_]]:
    """Returns a hash of the passage from each place on, and which of them are looked at."""
    tokens = inputs.cpu().numpy().astype(np.uint64)
    if tokens.shape[1] < PASSAGE:
        return np.zeros((len(tokens), 1), np.uint64), np.zeros((len(tokens), 1), bool)
    hashes = _rolled(tokens)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, PASSAGE, axis=1)
    chosen = hashes % ONE_IN == 0
    # One token over and over is padding, and everybody's.
    found = windows[chosen]
    chosen[chosen] = found.min(axis=1) < found.max(axis=1)
    return hashes, chosen


def _rolled(tokens: Hashes) -> Hashes:
    """Returns a polynomial of each passage modulo 2**64, from those of half the length and less."""
    length, span = 1, tokens + np.uint64(1)
    done, whole = 0, np.zeros((len(tokens), tokens.shape[1] + 1), np.uint64)
    while length <= PASSAGE:
        if PASSAGE & length:
            whole, done = _joined(whole, span, done, length), done + length
        # The row may be too short for a span that no passage needs.
        if 2 * length <= PASSAGE:
            span = _joined(span, span, length, length)
        length *= 2
    whole ^= whole >> np.uint64(29)
    return whole * np.uint64(_MIX) >> np.uint64(8)


def _joined(first: Hashes, second: Hashes, length: int, other: int) -> Hashes:
    """Appends to each span of `length` tokens the one of `other` tokens that follows it."""
    places = second.shape[1] - length
    return first[:, :places] * np.uint64(pow(_MIX, other, 1 << 64)) + second[:, length:]
