"""The W1.58A8 quantizers in float64, from the formulas of the BitNet b1.58 notes.

"The Era of 1-bit LLMs: Training Tips, Code and FAQ", figure 3. Written with divisions and
comparisons where implementations multiply by reciprocals and round, so that the two can only
agree by computing the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .arrays import ArrayLike, Float64, Int8, float64

EPS = 1e-5
"""Floor of absmean and of absmax."""


class Ternary(NamedTuple):
    """Ternary codes, their scale, and how far each weight is from changing its code.

    Attributes:
        codes: int8 (N, K) of -1, 0, +1.
        scale: Multiplies the codes.
        margin: float64 (N, K): | |w| / scale - 1/2 |, distance to the one threshold.
    """

    codes: Int8
    scale: float
    margin: Float64


class Int8Tokens(NamedTuple):
    """Int8 codes, their scale a token, and how far each value is from changing its code.

    Attributes:
        codes: int8 (..., K).
        scale: float64 (..., 1); multiplies the codes.
        margin: float64 (..., K): distance of |x| / scale to the nearest k + 1/2, in codes.
    """

    codes: Int8
    scale: Float64
    margin: Float64


def ternary(weight: ArrayLike) -> Ternary:
    """Absmean ternary codes: scale = max(mean |w|, EPS); code 0 where |w| <= scale / 2.

    Exactly half rounds to 0 (half to even), and everything above it to the sign: that is
    clamp(round(w / scale), -1, 1) without a rounding function.

    Args:
        weight: Weight (N, K).
    """
    w = float64(weight)
    scale = max(float(np.mean(np.abs(w))) if w.size else 0.0, EPS)
    ratio = np.abs(w) / scale
    codes = np.where(ratio > 0.5, np.sign(w), 0.0).astype(np.int8)
    return Ternary(codes, scale, np.abs(ratio - 0.5))


def ternary_parts(weight: ArrayLike, parts: Sequence[int]) -> list[Ternary]:
    """One `Ternary` for each run of `parts[i]` rows, as if each were a weight of its own."""
    pieces = np.split(float64(weight), np.cumsum(parts)[:-1])
    return [ternary(piece) for piece in pieces]


def int8_tokens(x: ArrayLike) -> Int8Tokens:
    """Absmax int8 codes of each token: scale = max(max |x|, EPS) / 127, codes = x / scale.

    Rounded half to even, as floor and remainder; never outside -127..127 because |x| <= 127 scale.

    Args:
        x: Activations (..., K), K >= 1.
    """
    values = float64(x)
    absmax = np.maximum(np.max(np.abs(values), axis=-1, keepdims=True), EPS)
    steps = np.abs(values) * 127.0 / absmax
    whole = np.floor(steps)
    rest = steps - whole
    up = (rest > 0.5) | ((rest == 0.5) & (whole % 2 == 1))
    codes = np.sign(values) * (whole + up)
    return Int8Tokens(codes.astype(np.int8), absmax / 127.0, np.abs(rest - 0.5))


def binary(weight: ArrayLike) -> tuple[Int8, float]:
    """BitNet v1 (arXiv 2310.11453): sign(w - mean w) with sign(0) = -1, and mean |w|."""
    w = float64(weight)
    codes = np.where(w - np.mean(w) > 0, 1, -1).astype(np.int8)
    return codes, max(float(np.mean(np.abs(w))), EPS)
