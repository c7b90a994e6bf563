"""The ternary linear layer by definition: integer product, output, gradients."""

from __future__ import annotations

import numpy as np

from .arrays import ArrayLike, Float64, Int64, float64, int64


def integer_product(activation_codes: ArrayLike, weight_codes: ArrayLike) -> Int64:
    """Returns sum over k of q[..., k] * C[n, k], exactly.

    Args:
        activation_codes: Integers (..., K).
        weight_codes: Integers (N, K).

    Returns:
        int64 (..., N).
    """
    return np.asarray(np.einsum("...k,nk->...n", int64(activation_codes), int64(weight_codes)))


def output(
    activation_codes: ArrayLike,
    activation_scale: ArrayLike,
    weight_codes: ArrayLike,
    weight_scale: ArrayLike,
    bias: ArrayLike | None = None,
) -> Float64:
    """Returns (q . C) * s * beta + bias in float64 (..., N); the bias is outside the scale.

    Args:
        activation_codes: Integers (..., K).
        activation_scale: (..., 1).
        weight_codes: Integers (N, K).
        weight_scale: One number, or one a row (N,).
        bias: (N,) or None.
    """
    accumulators = integer_product(activation_codes, weight_codes)
    y = accumulators * float64(activation_scale) * float64(weight_scale)
    return y if bias is None else y + float64(bias)


def l1(
    activation_codes: ArrayLike,
    activation_scale: ArrayLike,
    weight_codes: ArrayLike,
    weight_scale: ArrayLike,
) -> Float64:
    """Returns the sum of |terms| of each output (..., N): what rounding errors are relative to."""
    q, c = np.abs(int64(activation_codes)), np.abs(int64(weight_codes))
    return output(q, activation_scale, c, weight_scale)


def input_gradient(
    upstream: ArrayLike, weight_codes: ArrayLike, weight_scale: ArrayLike
) -> Float64:
    """The straight-through gradient of the input: G . (C * beta), float64 (..., K).

    Identity through rounding, clamp and scale; the *quantized* weight, because that is what the
    forward multiplied with.

    Args:
        upstream: G (..., N).
        weight_codes: C (N, K).
        weight_scale: beta.
    """
    return np.asarray(
        np.einsum("...n,nk->...k", float64(upstream), int64(weight_codes) * float64(weight_scale))
    )


def weight_gradient(
    upstream: ArrayLike, activation_codes: ArrayLike, activation_scale: ArrayLike
) -> Float64:
    """The straight-through gradient of the latent weight: G^T . (q * s), float64 (N, K).

    No mask where |w| exceeds the scale, no gradient through the scale, and the *quantized*
    activations. Leading dimensions are summed over.

    Args:
        upstream: G (..., N).
        activation_codes: q (..., K).
        activation_scale: s (..., 1).
    """
    grad = float64(upstream)
    x = int64(activation_codes) * float64(activation_scale)
    return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def bias_gradient(upstream: ArrayLike) -> Float64:
    """Returns the sum of G (..., N) over all but the last dimension, float64 (N,)."""
    grad = float64(upstream)
    return np.asarray(grad.reshape(-1, grad.shape[-1]).sum(axis=0))
