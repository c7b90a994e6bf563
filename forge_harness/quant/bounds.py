"""What finite precision allows: named limits of the W1.58A8 arithmetic, each with its derivation.

Notation: q int8 activation codes, C ternary weight codes, s and beta their fp32 scales, K input
features, u = 2**-24 the unit roundoff of fp32, L1 = sum over k of |q_k * s * C_k * beta|.
"""

from __future__ import annotations

import math

FP32_UNIT_ROUNDOFF = 2.0**-24
"""Largest relative error of one correctly rounded fp32 operation."""

INT8_CODE_MAX = 127
"""Largest activation code. -127 is the smallest the absmax quantizer makes: in fp32
x * (127 * (1 / g)) with |x| <= g is at most 127 * (1 + 3u), which rounds to 127. -128 stays legal
for foreign quantizers."""

INT32_MAX_K = (2**31 - 1) // 128
"""16,777,215: longest dot product of int8 with ternary codes an int32 holds, since each of the K
products is at most 128 in magnitude."""

FP32_EXACT_MAX_K = 2**24 // 128
"""131,072: longest dot product an fp32 matmul of the codes computes exactly, in any order: every
partial sum is an integer of at most 128 * K <= 2**24, and fp32 holds those. (132,104 would do for
|q| <= 127; the first failure was observed at 132,105.)"""

INT16_MAX_TERMS = (2**15 - 1) // 127
"""258: products of |q| <= 127 with ternary codes that an int16 partial accumulator holds."""

FAKE_QUANT_RTOL_L1 = 8 * FP32_UNIT_ROUNDOFF
"""|fake-quantized fp32 output - integer path| over L1, both without bias, for activations that are
independent of the weights; `fake_quant_rtol_worst` holds for any.

Each fake-quant term rounds q * s and its product with C * beta (C * beta itself is exact): 2u. The
integer path rounds s * beta and its product with the accumulator: 2u. Together 4u * L1 with every
error at its worst and of one sign. The fp32 summation gets as much again: when terms cancel,
partial sums stay near sqrt(K) terms, and so do their roundings. Measured over 350,000 Gaussian
outputs at each of 16 sizes: at most 2.4u for K = 1, 4.8u (the maximum) for K = 48, 2.3u for
K = 256, 1.2u for K = 1,024. With x a copy of a weight row (no cancelling) 8u is exceeded."""

WEIGHT_SCALE_RTOL = 1e-6
"""fp32 row-sum absmean against float64. torch sums in blocks of a depth near log2(n): for n = 2**24
that is 24u = 1.4e-6 at worst and near 1e-8 in practice, as all terms are non-negative."""

ACTIVATION_ERROR_CODES = 0.5 + 4 * 127 * FP32_UNIT_ROUNDOFF
"""|x / s - q| of a finite token above the floor: half a step of rounding, plus 4u of at most 127
for the roundings of 1 / g, its product with 127, the product of that with x, and s = g / 127.
(torch computes 127 / g as reciprocal and product; 2.4u was observed.)"""

GAUSSIAN_DENSITY = math.erfc(0.5 * math.sqrt(2 / math.pi) / math.sqrt(2))
"""0.68994: share of nonzero codes of Gaussian weights. A code is 0 iff |w| <= beta / 2, and
beta = sqrt(2 / pi) standard deviations."""


def fake_quant_rtol_worst(in_features: int) -> float:
    """Returns the tolerance for any operands: 4u, and K - 1 roundings of partial sums.

    No partial sum exceeds L1 (to first order in u), whatever the order of summation.
    """
    return (4 + in_features - 1) * FP32_UNIT_ROUNDOFF


def activation_error_bound(absmax: float, weight_scale: float, nonzeros: int) -> float:
    """Returns the largest |y(q * s) - y(x)| of one output of one token.

    Each of the `nonzeros` terms is off by at most half a step, s / 2 = absmax / 254.

    Args:
        absmax: max |x| of the token.
        weight_scale: beta.
        nonzeros: Nonzero codes in the weight row.
    """
    return absmax * weight_scale * nonzeros / 254


def activation_error_rms(
    activation_scale: float, weight_scale: float, in_features: int, density: float
) -> float:
    """Returns the expected RMS of y(q * s) - y(x): uniform rounding, variance s**2 / 12 a term.

    Observed ratios are 1.009 to 1.024, so 2.5 % is a sharp test of an absmax int8 quantizer.
    """
    return activation_scale * weight_scale * math.sqrt(in_features * density / 12)
