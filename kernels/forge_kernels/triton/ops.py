"""Launches the Triton kernels; arguments were checked by `forge_harness.kernels`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import interpreted, kernels

_FEW_TOKENS = 16
_MAGNITUDES = 1024
_EPS = 1e-5


def _configs() -> list[triton.Config]:
    """Tile sizes that autotuning tries; key: tokens (as a power of two), N, K."""
    sizes = [
        (16, 64, 128, 4, 4), (16, 64, 64, 8, 4), (16, 128, 64, 4, 4), (32, 64, 64, 4, 4),
        (64, 128, 64, 3, 4), (128, 128, 64, 3, 4), (128, 128, 64, 4, 8), (128, 256, 64, 3, 8),
        (128, 128, 128, 3, 8), (256, 128, 64, 3, 8), (64, 256, 64, 4, 8),
    ]  # fmt: skip
    return [
        triton.Config(
            {"BM": bm, "BN": bn, "BK": bk, "GROUP": 8}, num_stages=stages, num_warps=warps
        )
        for bm, bn, bk, stages, warps in sizes
    ]


def _prune(
    configs: list[triton.Config],
    arguments: dict[str, Any],
    **_: Any,  # noqa: ANN401 - triton's call
) -> list[triton.Config]:
    few = arguments["tokens"] <= _FEW_TOKENS
    return [c for c in configs if (c.kwargs["BM"] <= 32) == (few or arguments["tokens"] <= 32)]


def _autotuned(function: Any) -> Any:  # noqa: ANN401 - triton's types
    options: dict[str, Any] = {
        "configs": _configs(),
        "key": ["tokens_key", "rows", "blocks", "SPLIT", "ACCUMULATORS"],
        "prune_configs_by": {"early_config_prune": _prune},
        "reset_to_zero": ["y_ptr"],
    }
    try:
        return triton.autotune(**options, cache_results=True)(function)
    except TypeError:  # before 3.4 results live as long as the process
        return triton.autotune(**options)(function)


_FIXED = {"BM": 16, "BN": 64, "BK": 32, "GROUP": 8}
"""For the interpreter, which cannot be timed."""


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns int8 codes (M, K), fp32 scales (M,) and int32 sums (M,) of x (M, K)."""
    tokens, columns = x.shape
    x = x.contiguous()
    codes = torch.empty((tokens, -(-columns // 16) * 16), dtype=torch.int8, device=x.device)
    scales, sums = _quantized(x, codes, planes=False)
    return codes[:, :columns], scales, sums


def quantize_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 codes (N, K) and the fp32 scale () of a latent weight, as absmean_ternary.

    The mean is summed in another order than torch's: the scale differs by its rounding, and with it
    codes whose |w| / scale lies within that of 0.5.
    """
    w = w.detach().contiguous()
    size = w.numel()
    count = triton.cdiv(size, 16 * _MAGNITUDES)
    partial = torch.empty(count, dtype=torch.float32, device=w.device)
    kernels.magnitude_kernel[(count,)](w, partial, size, BLOCK=_MAGNITUDES)
    scale = (partial.sum() / size).clamp(min=_EPS)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    kernels.codes_kernel[(triton.cdiv(size, _MAGNITUDES),)](
        w, scale, codes, size, BLOCK=_MAGNITUDES
    )
    return codes, scale


def ternary_matmul(q: Tensor, data: Tensor, rows: int) -> Tensor:
    """int32 sums (M, rows) of int8 q (M, K)."""
    tokens, columns = q.shape
    q = q.contiguous()
    planes, sums = _planes(tokens, data)
    if tokens:
        kernels.arrange_kernel[(tokens,)](
            q, planes, sums, columns, data.shape[1], q.stride(0), BLOCK=_block(columns)
        )
    y = torch.empty((tokens, rows), dtype=torch.int32, device=q.device)
    return _product(planes, sums, None, data, rows, None, None, y)


def ternary_linear(
    x: Tensor,
    data: Tensor,
    rows: int,
    scale: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Quantizes x (M, K), multiplies, rescales into (M, rows) of x's dtype."""
    x = x.contiguous()
    planes, _ = _planes(x.shape[0], data)
    scales, sums = _quantized(x, planes, planes=True)
    if out is None:
        out = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    addend = None if bias is None else bias.detach().float().contiguous()
    if interpreted() and out.dtype == torch.bfloat16:
        # The interpreter cuts fp32 off where GPUs round; torch rounds as they do.
        wide = torch.empty_like(out, dtype=torch.float32)
        return out.copy_(_product(planes, sums, scales, data, rows, scale, addend, wide))
    return _product(planes, sums, scales, data, rows, scale, addend, out)


def _planes(tokens: int, data: Tensor) -> tuple[Tensor, Tensor]:
    shape = (tokens, 16 * data.shape[1])
    return (
        torch.empty(shape, dtype=torch.int8, device=data.device),
        torch.empty(tokens, dtype=torch.int32, device=data.device),
    )


def _quantized(x: Tensor, codes: Tensor, *, planes: bool) -> tuple[Tensor, Tensor]:
    tokens, columns = x.shape
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    sums = torch.empty(tokens, dtype=torch.int32, device=x.device)
    if tokens:
        kernels.quantize_kernel[(tokens,)](
            x, codes, sums, scales, columns, codes.shape[1] // 16, x.stride(0),
            BLOCK=_block(columns), PLANES=planes, **_exact(),
        )  # fmt: skip
    return scales, sums


def _product(
    planes: Tensor,
    sums: Tensor,
    scales: Tensor | None,
    data: Tensor,
    rows: int,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
) -> Tensor:
    tokens, blocks = planes.shape[0], data.shape[1]
    if not tokens:
        return y
    split = _split(tokens, rows, blocks)
    flags = {
        "SCALE_PER_ROW": weight_scale is not None and weight_scale.numel() > 1,
        "HAS_BIAS": bias is not None,
        "ACCUMULATORS": scales is None,
    }
    nvidia = not interpreted() and torch.version.hip is None
    target = y
    if split > 1:
        target = torch.zeros((tokens, rows), dtype=torch.int32, device=y.device)
    pointers = (
        planes,
        sums,
        _some(scales, sums),
        data,
        _some(weight_scale, sums),
        _some(bias, sums),
    )

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(tokens, meta["BM"]) * triton.cdiv(rows, meta["BN"]), split

    if interpreted():
        kernels.matmul_kernel[grid](
            *pointers, target, tokens, rows, blocks, 0, **flags, SPLIT=split, PACKED=False, **_FIXED
        )
    else:
        _tuned()[grid](
            *pointers, target, tokens, rows, blocks, 1 << (tokens - 1).bit_length(),
            **flags, SPLIT=split, PACKED=nvidia, **_exact(),
        )  # fmt: skip
    if split > 1:
        kernels.rescale_kernel[(tokens, triton.cdiv(rows, 1024))](
            target, *pointers[1:3], *pointers[4:], y, rows, **flags, BLOCK=1024, **_exact()
        )
    return y


def _split(tokens: int, rows: int, blocks: int) -> int:
    """Parts of K: enough programs for the GPU where few tokens leave few tiles."""
    if tokens > _FEW_TOKENS:
        return 1
    tiles = -(-rows // 64)
    return max(1, min(512 // tiles, blocks // 32, 16))


def _exact() -> dict[str, Any]:
    """Compiler options: each rounding is one of the reference's."""
    return {} if interpreted() else {"enable_fp_fusion": False}


def _some(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is never followed stands for what is not there."""
    return other if tensor is None else tensor


def _block(columns: int) -> int:
    return max(64, min(4096, 1 << (columns - 1).bit_length()))


_matmul: Any = None


def _tuned() -> Any:  # noqa: ANN401 - triton's types
    global _matmul
    if _matmul is None:
        _matmul = _autotuned(kernels.matmul_kernel)
    return _matmul
