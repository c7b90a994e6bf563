"""Values as a product in half precision takes them: autocast rounds its operands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import ArrayLike, Float64, float64

COMPUTED_RTOL = 2.0**-20
"""What an operand may be off by before it is rounded: sixteen roundings of fp32."""


@dataclass(frozen=True, slots=True)
class Narrowed:
    """Values in a narrower format.

    Attributes:
        values: Rounded half to even.
        slack: How far each may be from its value here, as it is near enough to a tie that what
            fp32 did before decides; 0 for most.
    """

    values: Float64
    slack: Float64


def narrowed(values: ArrayLike, roundoff: float) -> Narrowed:
    """Returns values rounded to a format of that unit roundoff, whatever its exponent's range.

    Args:
        values: Any shape.
        roundoff: Largest relative error of storing a value: 2**-8 for bf16, 2**-11 for fp16.
    """
    exact = float64(values)
    near = exact * (1 - COMPUTED_RTOL), exact * (1 + COMPUTED_RTOL)
    slack = np.abs(_rounded(near[1], roundoff) - _rounded(near[0], roundoff))
    return Narrowed(_rounded(exact, roundoff), slack)


def _rounded(values: Float64, roundoff: float) -> Float64:
    fraction, exponent = np.frexp(values)
    # The fraction is at least 1/2 and has as many bits as the roundoff is a power of two.
    rounded: Float64 = np.ldexp(np.rint(fraction / roundoff) * roundoff, exponent)
    return rounded
