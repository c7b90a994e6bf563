"""What a training step asks of the native kernels: each in one pass over its operands.

Eager torch makes a pass, and a new tensor, of each operation: a step of the byte model spent a
third of its time so. These return the bits torch's operations return, but for those of a NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .backends import native, native_if_loaded, native_problem, product_path
from .captured import dispatch_modes, is_compiling
from .dispatch import DTYPES, native_activation_codes, thread_count
from .packed import MAX_COLUMNS

_PLAIN = (Tensor, torch.nn.Parameter)
_tracing = torch._C._get_tracing_state
_transforming = torch._C._are_functorch_transforms_active
_batched = torch._C._functorch.is_legacy_batchedtensor  # of is_grads_batched
_proxies: Callable[[], int] = torch._ops._len_torch_dispatch_stack_pre_dispatch


@cache
def _can_load() -> bool:
    # Remembered: Python tries a failed import again each time.
    return not native_problem()


def fits(*tensors: Tensor | None) -> bool:
    """Whether the native kernels can take these: plain tensors with memory on the CPU.

    Not while something records or transforms operators: a compiler fuses torch's own better than a
    kernel it cannot look into, and tensors that are traced have no memory.
    """
    if is_compiling() or dispatch_modes() or _tracing() or _transforming() or _proxies():
        return False
    for tensor in tensors:
        if tensor is not None and not (
            tensor.is_cpu
            and type(tensor) in _PLAIN
            and tensor.layout is torch.strided
            and not tensor._is_zerotensor()
            and not _batched(tensor)
        ):
            return False
    return native_if_loaded() is not None or _can_load()


def weight_codes(w: Tensor, scale: Tensor) -> Tensor:
    """Returns clamp(round(w / scale), -1, 1) as `quant.ternary_codes` does.

    Args:
        w: Weight (N, K), any floating dtype; see `fits`.
        scale: fp32, one entry.

    Returns:
        int8 (N, K).
    """
    values, scale = _fp32(w.detach()), _fp32(scale)
    codes = values.new_empty(values.shape, dtype=torch.int8)
    native().code_weights(
        product_path(None),
        values.data_ptr(),
        values.numel(),
        scale.data_ptr(),
        codes.data_ptr(),
        thread_count(),
    )
    return codes


def activation_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what `quantize_activations` and `quant.absmax_int8` do.

    Args:
        x: Activations (..., K), floating, K at least 1; see `fits`.

    Returns:
        int8 (..., K) and fp32 scales (..., 1).
    """
    return native_activation_codes(x, None)


def linear_of_codes(
    q: Tensor,
    activation_scale: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """Returns (q . codes) * (activation_scale * weight_scale) + bias, exact before it is rescaled.

    Args:
        q: int8 (..., K); see `fits`.
        activation_scale: fp32 (..., 1).
        codes: int8 (N, K).
        weight_scale: fp32 (1,) or (N,).
        bias: (N,) or None.
        dtype: Of the result.

    Returns:
        (..., N), or None where the kernels have no such product: codes that are not ternary, other
        dtypes, shapes that do not agree, no values at all, rows that are too long.
    """
    if codes.dim() != 2:
        return None
    rows, columns = codes.shape
    tokens = activation_scale.numel()
    if (
        (q.dtype, codes.dtype) != (torch.int8, torch.int8)
        or (activation_scale.dtype, weight_scale.dtype) != (torch.float32, torch.float32)
        or activation_scale.shape != (*q.shape[:-1], 1)
        or q.shape[-1:] != (columns,)
        or weight_scale.numel() not in (1, rows)
        or (bias is not None and bias.shape != (rows,))
        or not (tokens and rows and 0 < columns <= MAX_COLUMNS)
    ):
        return None
    q, codes = q.contiguous(), codes.contiguous()
    activation_scale, weight_scale = _fp32(activation_scale), _fp32(weight_scale)
    addend = None if bias is None else _fp32(bias.detach())
    kept = dtype if dtype in DTYPES else torch.float32
    y = q.new_empty((*q.shape[:-1], rows), dtype=kept)
    ternary: bool = native().linear_of_codes(
        product_path(None),
        q.data_ptr(),
        activation_scale.data_ptr(),
        tokens,
        columns,
        codes.data_ptr(),
        rows,
        weight_scale.data_ptr(),
        weight_scale.numel() > 1,
        0 if addend is None else addend.data_ptr(),
        y.data_ptr(),
        DTYPES[kept],
        thread_count(),
    )
    if not ternary:  # a quantizer of more than three levels
        return None
    return y.to(dtype)


def scaled_bf16(
    values: Tensor, by_row: Tensor | None, by_column: Tensor | None
) -> tuple[Tensor | None, Tensor | None] | None:
    """Returns (values * by_row).T and values * by_column in bf16, in one pass; None for None.

    Turned, since torch's bf16 product takes 1.5 times as long by a left factor that is a view
    (oneDNN on AMX, M 2048, N 768, K 256).

    Args:
        values: fp32 (M, N); see `fits`.
        by_row: fp32 (M, 1).
        by_column: fp32 (N,) or (1,).

    Returns:
        bf16 (N, M) and (M, N), contiguous, rounded once to fp32 and once to bf16; None in place of
        both where the factors have other shapes or dtypes.
    """
    rows, columns = values.shape
    for factor, shapes in ((by_row, ((rows, 1),)), (by_column, ((columns,), (1,)))):
        if factor is not None and (factor.dtype, factor.shape in shapes) != (torch.float32, True):
            return None
    values = _fp32(values)
    by_row = None if by_row is None else _fp32(by_row)
    by_column = None if by_column is None else _fp32(by_column)
    turned = None if by_row is None else values.new_empty((columns, rows), dtype=torch.bfloat16)
    columnwise = None if by_column is None else torch.empty_like(values, dtype=torch.bfloat16)
    native().narrow_rows(
        product_path(None),
        values.data_ptr(),
        rows,
        columns,
        0 if by_row is None else by_row.data_ptr(),
        0 if turned is None else turned.data_ptr(),
        0 if by_column is None else by_column.data_ptr(),
        by_column is not None and by_column.numel() > 1,
        0 if columnwise is None else columnwise.data_ptr(),
        thread_count(),
    )
    return turned, columnwise


def _fp32(tensor: Tensor) -> Tensor:
    # The usual case asks little: a step calls this some hundred times.
    if tensor.dtype is torch.float32 and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.float().resolve_neg().contiguous()
