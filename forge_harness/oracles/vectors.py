"""Directed inputs: the values at which quantizers of real projects have gone wrong.

Random normal inputs are blind to zero rows, exact halves, extremes, odd shapes and unequal
magnitudes. Everything here is deterministic; arrays are float32 unless stated.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

ODD_SHAPES = (
    *((1, 1), (1, 2), (2, 1), (3, 5), (4, 4), (5, 3), (7, 13), (8, 31), (9, 64), (13, 7)),
    *(
        (16, 127),
        (31, 33),
        (33, 128),
        (63, 65),
        (64, 1),
        (65, 96),
        (127, 2),
        (128, 129),
        (130, 130),
    ),
)
"""(N, K) around every block size in use (4, 8, 16, 32, 64, 128), one below and one above."""

WEIGHT_TIES: Float32 = np.array([[0.5, -0.5, 1.5, 1.5]], dtype=np.float32)
"""Mean |w| is exactly 1. Half to even: 0, 0, 1, 1; half up: 1, 0, 1, 1; half away: 1, -1, 1, 1."""
WEIGHT_TIE_CODES = ((0, 0, 1, 1),)

ACTIVATION_TIES: Float32 = np.array(
    [[127, 0.5, 1.5, -0.5, 2.5, -1.5, 126.5, -126.5, -2.5, 3.5]], dtype=np.float32
)
"""The scale is exactly 1, so every .5 is an exact tie."""
ACTIVATION_TIE_CODES = ((127, 0, 2, 0, 2, -2, 126, -126, -2, 4),)


def generator(seed: int) -> np.random.Generator:
    """Returns NumPy's PCG64 generator: the same numbers on every platform."""
    return np.random.default_rng(seed)


def weights(seed: int = 0) -> Iterator[tuple[str, Float32]]:
    """Yields (name, weight (N, K)) over shapes and distributions a quantizer must survive."""
    rng = generator(seed)
    for rows, columns in ODD_SHAPES:
        yield f"normal_{rows}x{columns}", _f32(rng.standard_normal((rows, columns)))
    base = rng.standard_normal((130, 96))
    yield "rows_of_unequal_magnitude", _f32(base * np.logspace(-3, 3, 130)[:, None])
    yield "columns_of_unequal_magnitude", _f32(base * np.logspace(-3, 3, 96)[None, :])
    # Chunked means of equal weight (64 + 64 + 2 rows) are off by a third here.
    yield "last_rows_large", _f32(np.where(np.arange(130)[:, None] >= 128, 50.0, 1.0) * base)
    yield "mean_far_from_zero", _f32(base + 3.0)
    yield "first_weight_zero", _f32(np.where(np.arange(96) == 0, 0.0, base))
    yield "one_outlier", _f32(np.where(np.arange(130 * 96).reshape(130, 96) == 77, 1e4, base))
    yield "mostly_zero", _f32(np.where(rng.random((130, 96)) < 0.98, 0.0, base))
    yield "laplace", _f32(rng.laplace(size=(33, 65)))
    for exponent in (-3, 0, 3, 6):
        yield f"magnitude_1e{exponent}", _f32(rng.standard_normal((31, 33)) * 10.0**exponent)
    yield "just_above_floor", _f32(rng.standard_normal((31, 33)) * 3e-5)


def weights_on_thresholds() -> Iterator[tuple[str, Float32, tuple[tuple[int, ...], ...]]]:
    """Yields (name, weight (1, 4), codes): exact ties at powers of two, and their negatives.

    Powers of two scale exactly in any arithmetic, so each is as exact a tie as the first.
    """
    for exponent in (-10, -3, 0, 5):
        factor = np.float32(2.0**exponent)
        yield f"ties_2^{exponent}", WEIGHT_TIES * factor, WEIGHT_TIE_CODES
        negative = tuple(tuple(-code for code in row) for row in WEIGHT_TIE_CODES)
        yield f"negative_ties_2^{exponent}", -WEIGHT_TIES * factor, negative
    above = WEIGHT_TIES.copy()
    above[0, 0] = np.nextafter(np.float32(0.5), np.float32(1))
    yield "one_ulp_above_half", above, ((1, 0, 1, 1),)


def activations(seed: int = 0) -> Iterator[tuple[str, Float32]]:
    """Yields (name, activations (..., K)) whose tokens are all above the floor."""
    rng = generator(seed)
    for rows, columns in ODD_SHAPES:
        yield f"normal_{rows}x{columns}", _f32(rng.standard_normal((rows, columns)))
    # 2e-5 is the smallest magnitude that stays above the floor with any rounding of it.
    magnitudes = np.concatenate([[2e-5, 5e-5], np.logspace(-4, 6, 11)])
    unit = rng.uniform(-1, 1, (len(magnitudes), 67))
    unit[:, 3] = np.where(np.arange(len(magnitudes)) % 2, 1.0, -1.0)
    yield "magnitudes_2e-5_to_1e6", _f32(unit * magnitudes[:, None])
    yield "three_dimensions", _f32(rng.standard_normal((3, 5, 33)) * np.logspace(-2, 2, 5)[:, None])
    yield "extremes_of_both_signs", _f32(np.tile([3.0, -3.0, 2.99, -2.99, 0.0], (4, 7)))
    yield "single_large_feature", _f32(np.where(np.arange(65) == 40, 1e5, rng.random((5, 65))))
    yield "constant_rows", _f32(np.repeat([[1e-4], [1.0], [777.0]], 48, axis=1))
    yield "squared_relu", _f32(np.maximum(rng.standard_normal((9, 96)), 0) ** 2)
    yield "ties", ACTIVATION_TIES


def floor_rows(columns: int = 33) -> Float32:
    """Returns rows at and below the floor: zeros, denormals, 1e-20, 1e-6, and one ordinary row."""
    values = np.array([0.0, 1e-40, -1e-38, 1e-20, 1e-7, -1e-6, 1e-5, 1.0])
    rows = np.repeat(values[:, None], columns, axis=1)
    rows[:, 1::2] *= -0.5
    return _f32(rows)


def _f32(values: NDArray[np.floating]) -> Float32:
    return np.ascontiguousarray(values, dtype=np.float32)
