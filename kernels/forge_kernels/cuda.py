"""The CUDA decode kernel (csrc/cuda/ternary_gemv.cu): up to eight tokens."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from . import nvrtc

MOST_TOKENS = 8
_THREADS = 256
_INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_BLOCKS_A_PROCESSOR = 3
"""Thread blocks wanted on each multiprocessor: enough loads in flight for the memory's latency."""
_SHARED = 32 * 1024
"""Bytes of quantized activations in a thread block; longer rows are split into more slices."""


class _Arguments(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("x", "weights", "scales", "bias", "y", "sums", "arrived")
    ] + [
        (name, ctypes.c_int)
        for name in ("tokens", "columns", "rows", "blocks", "slices", "scale_per_row")
    ]


def source() -> str:
    """Returns the CUDA C++ source: packaged, or in the checkout."""
    here = Path(__file__).resolve().parent
    for path in (here / "csrc", here.parent / "csrc"):
        file = path / "cuda" / "ternary_gemv.cu"
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise FileNotFoundError("ternary_gemv.cu is not in the installation; install the package again")


def options(tokens: int, dtype: torch.dtype) -> tuple[str, ...]:
    """NVRTC's options for a number of tokens (1, 2, 4, 8) and an input dtype."""
    defines = (f"-DFORGE_TOKENS={tokens}", f"-DFORGE_INPUT={_INPUTS[dtype]}")
    # Each rounding is one of the reference's: no fused multiply-add.
    return ("--std=c++17", "--fmad=false", *defines)


def problem(device: str = "cuda") -> str:
    """Returns why the kernel cannot run on a device type, or ""."""
    if device != "cuda":
        return "it runs on NVIDIA GPUs"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no NVIDIA GPU is visible to torch"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return nvrtc.problem()


def ternary_matmul(q: Tensor, data: Tensor, rows: int) -> Tensor:
    """int32 sums (M, rows) of int8 q (M, K), M at most 8; see `forge_harness.kernels`."""
    y = torch.empty((q.shape[0], rows), dtype=torch.int32, device=q.device)
    return _launched(q, data, rows, None, None, y)


def ternary_linear(
    x: Tensor,
    data: Tensor,
    rows: int,
    scale: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Quantizes x (M, K), multiplies, rescales into (M, rows) of x's dtype; M at most 8.

    Args:
        x: fp32, bf16 or fp16; another floating dtype is converted.
        data: uint8 (G, B, 256).
        rows: N.
        scale: fp32 (1,) or (N,).
        bias: (N,) or None.
        out: Contiguous (M, N) of x's dtype, or None.
    """
    if x.dtype not in _INPUTS or x.dtype == torch.int8:
        y = ternary_linear(x.float(), data, rows, scale, bias).to(x.dtype)
        return y if out is None else out.copy_(y)
    if out is None:
        out = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    addend = None if bias is None else bias.detach().float().contiguous()
    return _launched(x, data, rows, scale, addend, out)


def _launched(
    x: Tensor, data: Tensor, rows: int, scale: Tensor | None, bias: Tensor | None, y: Tensor
) -> Tensor:
    tokens, columns = x.shape
    groups, blocks, _ = data.shape
    if tokens == 0:
        return y
    assert tokens <= MOST_TOKENS
    x = x.contiguous()
    capacity = 1 << (tokens - 1).bit_length()
    with torch.cuda.device(x.device):
        kernel = _kernel(capacity, x.dtype, x.device.index or 0)
        stream = torch.cuda.current_stream().cuda_stream
        slices = _slices(groups, blocks, capacity, x.device.index or 0)
        sums, arrived = _workspace(groups * capacity * 64, groups, x.device.index or 0, stream)
        arguments = _Arguments(
            x.data_ptr(),
            data.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            sums.data_ptr(),
            arrived.data_ptr(),
            tokens,
            columns,
            rows,
            blocks,
            slices,
            int(scale is not None and scale.numel() > 1),
        )
        shared = capacity * 16 * -(-blocks // slices)
        kernel((groups, slices), _THREADS, shared, stream, arguments)
    return y


@lru_cache
def _kernel(tokens: int, dtype: torch.dtype, device: int) -> nvrtc.Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    cubin = nvrtc.compiled(source(), options(tokens, dtype), f"sm_{major}{minor}")
    return nvrtc.Kernel(cubin, "ternary_gemv")


@lru_cache
def _slices(groups: int, blocks: int, tokens: int, device: int) -> int:
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = -(-_BLOCKS_A_PROCESSOR * processors // groups)
    # A slice is at least one block of weights for each half-warp.
    slices = max(1, min(wanted, blocks // 16))
    return max(slices, -(-blocks * 16 * tokens // _SHARED))


@lru_cache
def _workspace(sums: int, groups: int, device: int, stream: int) -> tuple[Tensor, Tensor]:
    """Zeroed once; every call leaves it zero. One a stream, as calls of a stream follow each other."""
    return (
        torch.zeros(sums, dtype=torch.int32, device=f"cuda:{device}"),
        torch.zeros(groups, dtype=torch.int32, device=f"cuda:{device}"),
    )
