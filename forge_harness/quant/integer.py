"""The integer path of W1.58A8: exact accumulators of codes, and the factor that rescales them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bounds import FP32_EXACT_MAX_K, INT32_MAX_K
from .ste import Quantizer, token_scales, weight_scales
from .ternary import absmax_int8, absmean_ternary

_CUDA_MIN_ROWS = 17
"""torch._int_mm on CUDA refuses fewer rows."""


def int8_matmul(q: Tensor, codes: Tensor) -> Tensor:
    """Returns q @ codes.T exactly, by `torch._int_mm`.

    On CUDA operands are padded with zeros, which add nothing to an integer sum, to what cuBLASLt
    takes: more than 16 rows, K and N multiples of 8.

    Args:
        q: int8 (M, K), of any strides.
        codes: int8 (N, K), K <= `INT32_MAX_K`.

    Returns:
        int32 (M, N).

    Raises:
        ValueError: The operands have rows of different lengths, or K is so large that int32 could
            overflow.
    """
    _check_rows(q, codes)
    check_k(q.shape[1], INT32_MAX_K, "int32 accumulators", "split the layer along K")
    rows, columns, outputs = q.shape[0], q.shape[1], codes.shape[0]
    if q.device.type == "cuda":
        rows, columns, outputs = _cuda_sizes(rows, columns, outputs)
    product = torch._int_mm(
        _padded(q, rows, columns), _transposed(_padded(codes, outputs, columns))
    )
    return product[: q.shape[0], : codes.shape[0]]


def fp32_matmul(q: Tensor, codes: Tensor) -> Tensor:
    """Returns q @ codes.T as integer-valued fp32 (M, N), exactly, for K <= `FP32_EXACT_MAX_K`.

    Raises:
        ValueError: As `int8_matmul`, K being so large that fp32 could round a partial sum.
    """
    _check_rows(q, codes)
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
        ValueError: The shapes do not fit, those of the scales included, or K exceeds
            `INT32_MAX_K`.
    """
    codes, weight_scale = quantize_weight(w.detach())
    q, activation_scale = quantize_activation(x.detach())
    accumulators = int8_matmul(q.reshape(-1, q.shape[-1]), codes)
    factor = token_scales(activation_scale, q) * weight_scales(weight_scale, codes.shape[0])
    return accumulators.reshape(*x.shape[:-1], codes.shape[0]), factor


def _cuda_sizes(rows: int, columns: int, outputs: int) -> tuple[int, int, int]:
    return max(rows, _CUDA_MIN_ROWS), columns + -columns % 8, outputs + -outputs % 8


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Returns the matrix with zeros up to a size, row by row in memory."""
    if matrix.shape != (rows, columns):
        return F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))
    # Not contiguous(): the stride of a dimension of one entry may then be any, and _int_mm takes
    # it for the length of a row (torch 2.13: wrong sums, no error).
    if matrix.stride() == (columns, 1):
        return matrix
    return matrix.new_empty((rows, columns)).copy_(matrix)


def _transposed(matrix: Tensor) -> Tensor:
    # A column turned has the strides (1, 1); see `_padded`.
    return matrix.reshape(1, -1) if matrix.shape[1] == 1 else matrix.t()


def _check_rows(q: Tensor, codes: Tensor) -> None:
    if q.shape[1] != codes.shape[1]:
        raise ValueError(
            f"Operands have shapes {tuple(q.shape)} and {tuple(codes.shape)}; expected (M, K) and "
            "(N, K): the last dimension of both is the input features."
        )


def check_k(k: int, limit: int, what: str, remedy: str) -> None:
    """Raises ValueError when a dot product of length `k` exceeds `limit`."""
    if k > limit:
        raise ValueError(f"K = {k:,}; {what} of these codes hold up to K = {limit:,}: {remedy}.")
