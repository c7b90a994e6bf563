"""Straight-through estimators: the quantized value forward, the identity backward.

Plain STE as in BitNet b1.58: identity through rounding, clamp and scale. No mask where the code
saturates, no gradient through a scale. These are autograd functions rather than the usual
w + (wq - w).detach(), which in fp32 misses wq by one rounding in 7 % of the weights, and in bf16 by
up to 2 % of the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ternary import absmax_int8, absmean_ternary, dequantize

Quantizer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Values -> (int8 codes, fp32 scale that multiplies them)."""


class _StraightThrough(torch.autograd.Function):
    """Returns `quantized` forward; hands its gradient to `latent` unchanged."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, quantized: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        return quantized.to(latent.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - torch's
        return grad, None


# Function.apply has no type of its own.
_straight_through: Callable[[Tensor, Tensor], Tensor] = _StraightThrough.apply


def straight_through(latent: Tensor, quantized: Tensor) -> Tensor:
    """Returns `quantized` in `latent`'s dtype, with the gradient going to `latent` as it is."""
    return _straight_through(latent, quantized.detach())


def round_ste(x: Tensor) -> Tensor:
    """Rounds half to even; the gradient is the identity."""
    return straight_through(x, x.detach().round())


def fake_quantize_weight(w: Tensor, quantize: Quantizer = absmean_ternary) -> Tensor:
    """Returns scale * codes of a weight (N, K) in its dtype; identity gradient."""
    codes, scale = quantize(w)
    return straight_through(w, dequantize_weight(codes, scale))


def fake_quantize_activation(x: Tensor, quantize: Quantizer = absmax_int8) -> Tensor:
    """Returns scale * codes of activations (..., K) in their dtype; identity gradient.

    Raises:
        ValueError: The quantizer's scale has neither one entry nor one a token.
    """
    codes, scale = quantize(x)
    return straight_through(x, dequantize(codes, token_scales(scale, codes)))


def dequantize_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """Returns scale * codes (N, K) in fp32, for one scale or one a row.

    Raises:
        ValueError: `scale` has neither one entry nor one a row.
    """
    return dequantize(codes, weight_scales(scale, codes.shape[0])[:, None])


def weight_scales(scale: Tensor, rows: int) -> Tensor:
    """Returns a weight scale as fp32 (1,) or (N,).

    Raises:
        ValueError: `scale` has neither one entry nor one a row.
    """
    if scale.numel() not in (1, rows):
        raise ValueError(
            f"weight scale has shape {tuple(scale.shape)}; expected one entry, or one for each of "
            f"the {rows} rows: repeat the scale of a part over its rows."
        )
    return scale.detach().float().reshape(-1)


def token_scales(scale: Tensor, codes: Tensor) -> Tensor:
    """Returns the scale of activation codes (..., K) as (..., 1), one entry a token.

    Raises:
        ValueError: `scale` is of another shape: torch would spread it over features, or over
            outputs, wherever their number happens to be that of the tokens.
    """
    expected = (*codes.shape[:-1], 1)
    if scale.shape == expected:
        return scale
    fits = zip(scale.shape[::-1], expected[::-1], strict=False)
    if scale.dim() > len(expected) or any(own not in (1, size) for own, size in fits):
        raise ValueError(
            f"activation scale has shape {tuple(scale.shape)}; expected {tuple(expected)}, one "
            "entry a token, or a single entry: keep the last dimension when it is reduced."
        )
    return scale.expand(expected)
