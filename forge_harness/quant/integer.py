"""The integer path of W1.58A8: exact accumulators of codes, and the factor that rescales them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bounds import FP32_EXACT_MAX_K, INT32_MAX_K
from .ste import Quantizer, weight_scales
from .ternary import absmax_int8, absmean_ternary

_CUDA_MIN_ROWS = 17
"""torch._int_mm on CUDA refuses fewer rows."""


def int8_matmul(q: Tensor, codes: Tensor) -> Tensor:
    """Returns q @ codes.T exactly, by `torch._int_mm`.

    Operands are padded with zeros, which add nothing to an integer sum, where the function needs
    it: on CPU K = 1 is padded to 2, because torch 2.13 returns wrong sums for it without an error;
    on CUDA every size goes to what cuBLASLt takes (more than 16 rows, K and N multiples of 8).

    Args:
        q: int8 (M, K).
        codes: int8 (N, K), K <= `INT32_MAX_K`.

    Returns:
        int32 (M, N).

    Raises:
        ValueError: K is so large that int32 could overflow.
    """
    check_k(q.shape[1], INT32_MAX_K, "int32 accumulators", "split the layer along K")
    sizes = _cuda_sizes if q.device.type == "cuda" else _cpu_sizes
    rows, columns, outputs = sizes(q.shape[0], q.shape[1], codes.shape[0])
    product = torch._int_mm(_pad(q, rows, columns), _pad(codes, outputs, columns).t())
    return product[: q.shape[0], : codes.shape[0]]


def fp32_matmul(q: Tensor, codes: Tensor) -> Tensor:
    """Returns q @ codes.T as integer-valued fp32 (M, N), exactly, for K <= `FP32_EXACT_MAX_K`.

    Raises:
        ValueError: K is so large that fp32 could round a partial sum.
    """
    check_k(q.shape[1], FP32_EXACT_MAX_K, "exact fp32 sums", 'use compute="int8"')
    return q.float() @ codes.float().t()


def integer_linear(
    x: Tensor,
    w: Tensor,
    *,
    quantize_weight: Quantizer = absmean_ternary,
    quantize_activation: Quantizer = absmax_int8,
) -> tuple[Tensor, Tensor]:
    """The inference arithmetic of a ternary linear layer, bit-exact and without gradient.

    accumulators * factor is the layer's output without bias; the product is the only rounding
    after the factor's own.

    Args:
        x: Activations (..., K), floating.
        w: Latent weight (N, K), floating.
        quantize_weight: Weight quantizer; its scale has one entry, or one a row.
        quantize_activation: Activation quantizer.

    Returns:
        accumulators: int32 (..., N).
        factor: fp32 (..., 1), or (..., N) for a scale a row.

    Raises:
        ValueError: The shapes do not fit, or K exceeds `INT32_MAX_K`.
    """
    codes, weight_scale = quantize_weight(w.detach())
    q, activation_scale = quantize_activation(x.detach())
    accumulators = int8_matmul(q.reshape(-1, q.shape[-1]), codes)
    factor = activation_scale * weight_scales(weight_scale, codes.shape[0])
    return accumulators.reshape(*x.shape[:-1], codes.shape[0]), factor


def _cpu_sizes(rows: int, columns: int, outputs: int) -> tuple[int, int, int]:
    return rows, 2 if columns == 1 else columns, outputs


def _cuda_sizes(rows: int, columns: int, outputs: int) -> tuple[int, int, int]:
    return max(rows, _CUDA_MIN_ROWS), columns + -columns % 8, outputs + -outputs % 8


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    if matrix.shape == (rows, columns):
        return matrix.contiguous()
    return F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def check_k(k: int, limit: int, what: str, remedy: str) -> None:
    """Raises ValueError when a dot product of length `k` exceeds `limit`."""
    if k > limit:
        raise ValueError(f"K = {k:,}; {what} of these codes hold up to K = {limit:,}: {remedy}.")
