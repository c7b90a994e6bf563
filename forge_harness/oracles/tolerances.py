"""Limits of numeric error, each with its derivation.

u = 2**-24 is the unit roundoff of fp32. L1 is the sum of |terms| of an output.
"""

from __future__ import annotations

import math

UNIT_ROUNDOFF = 2.0**-24
"""Largest relative error of one correctly rounded fp32 operation."""

SCALE_RTOL = 1e-6
"""fp32 absmean against float64. Blocked or pairwise summation of n non-negative terms errs by at
most about log2(n) u: 24 u = 1.4e-6 at n = 2**24, and 16 u at the sizes the checks use. An absmax
scale has two roundings, 2 u."""

TERNARY_MARGIN = SCALE_RTOL
"""A ternary code may differ from float64 only where | |w| / scale - 1/2 | is within this: half of
SCALE_RTOL from the scale, and 3 u of 1/2 from the reciprocal, the product and the rounding."""

INT8_MARGIN = 4 * 127 * UNIT_ROUNDOFF
"""An activation code may differ from float64 by one, and only where |x| / scale is within this of
k + 1/2: 1 / g, its product with 127, their product with x and a scale stored as fp32 round by u
each, relative to at most 127."""

LINEAR_RTOL_L1 = 8 * UNIT_ROUNDOFF
"""|fp32 output - exact output| over L1, for any order of operations of a ternary linear layer.

Dequantised operands: q * s, C * beta (exact) and their product round, 2 u a term; the sum of K
terms rounds K - 1 times, (K - 1) u at the very worst; a float64 reference is exact. That is
(K + 1) u, so 8 u is rigorous up to K = 7. Beyond, the rounding errors of a sum average out: the
largest seen is 2.4 u at K = 64, 0.9 u at 1,024, 0.27 u at 8,192. The integer path: 3 u."""

RESCALE_RTOL = 4 * UNIT_ROUNDOFF
"""Relative error of accumulators * factor: s * beta in any association, then the product."""

ONE_ULP = 2 * UNIT_ROUNDOFF
"""Relative distance of neighbouring fp32 numbers, at most."""


def gradient_limit(terms: int) -> float:
    """Returns the largest error of an fp32 gradient over the sum of its |terms|.

    Three roundings a term (scale, operand, product) and the roundings of the summation, which grow
    as sqrt(terms) with probability above 1 - 2 exp(-18) at six standard deviations.

    Args:
        terms: Length of the sum: N for an input gradient, tokens for a weight gradient.
    """
    return (3 + 6 * math.sqrt(max(1, terms))) * UNIT_ROUNDOFF


def mean_gradient_limit(terms: int) -> float:
    """Returns the limit of |a - b| / |b| in L2 for one mean gradient summed in two groupings.

    Both sums err by `gradient_limit`; 32 allows for terms that cancel (the sum of |terms| is larger
    than the sum) and for the layers the difference passes through.

    Args:
        terms: Samples, or tokens, of the whole batch.
    """
    return 2 * 32 * gradient_limit(terms)
