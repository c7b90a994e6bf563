"""The CUDA decode kernel (csrc/cuda/ternary_gemv.cu): up to eight tokens."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import nvrtc
from .layout import blocks_shape

MOST_TOKENS = 8
_INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_RESERVED = 1024
"""Bytes of shared memory that CUDA takes for itself in each thread block."""
_RESIDENT_THREADS = 1024
"""Threads of this kernel a multiprocessor holds, at 64 registers each."""
_AHEAD = 4
"""Rounds of weights a thread asks for before it uses the first (kAhead in the source)."""


class _Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "weights", "scales", "bias", "y")] + [
        (name, ctypes.c_int) for name in ("tokens", "columns", "rows", "blocks", "scale_per_row")
    ]


def source() -> str:
    """Returns the CUDA C++ source: packaged, or in the checkout."""
    here = Path(__file__).resolve().parent
    for path in (here / "csrc", here.parent / "csrc"):
        file = path / "cuda" / "ternary_gemv.cu"
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise FileNotFoundError("ternary_gemv.cu is not in the installation; install the package again")


def options(tokens: int, dtype: torch.dtype, rows: int, threads: int) -> tuple[str, ...]:
    """NVRTC's options; the values are those the source names."""
    defines = {
        "FORGE_TOKENS": tokens,
        "FORGE_INPUT": _INPUTS[dtype],
        "FORGE_ROWS": rows,
        "FORGE_THREADS": threads,
    }
    # Each rounding is one of the reference's: no fused multiply-add.
    return ("--std=c++17", "--fmad=false", *(f"-D{k}={v}" for k, v in defines.items()))


def shape(groups: int, blocks: int, processors: int) -> tuple[int, int]:
    """Returns rows and threads of a thread block.

    Rows: what gives the busiest multiprocessor the least. Threads: so many that the first rounds of
    loads cover all of K, and no more than leave every thread block resident at once.
    """
    rows = min((64, 32, 16), key=lambda r: -(-groups * 64 // r // processors) * r)
    resident = -(-groups * 64 // rows // processors)
    wanted = blocks * rows // 4 // _AHEAD
    threads = 128
    while threads < min(512, wanted) and 2 * threads * resident <= _RESIDENT_THREADS:
        threads *= 2
    return rows, threads


def static_bytes(capacity: int, rows: int, threads: int) -> int:
    """Returns the shared memory the source declares: maxima, sums of codes, partial sums.

    Args:
        capacity: FORGE_TOKENS.
        rows: FORGE_ROWS.
        threads: FORGE_THREADS.
    """
    return capacity * (threads // 32) * (4 * rows + 8)


def refusal(tokens: int, rows: int, columns: int) -> str:
    """Returns why the current device has no room for a product, or "".

    The activations of all tokens lie in the shared memory of each thread block.

    Args:
        tokens: M, at most 8.
        rows: N of the weight.
        columns: K.
    """
    groups, blocks, _ = blocks_shape(rows, columns)
    capacity = _capacity(tokens)
    needed = _codes_bytes(capacity, blocks)
    room = _room(capacity, groups, blocks, torch.cuda.current_device())
    if needed <= room:
        return ""
    return (
        f"{tokens} tokens of {columns} columns take {needed:,} bytes of a multiprocessor's shared "
        f"memory, which has room for {room:,}; choose 'triton' or 'auto'"
    )


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
    device, capacity = x.device.index or 0, _capacity(tokens)
    shared = _codes_bytes(capacity, blocks)
    with torch.cuda.device(device):
        if shared > _room(capacity, groups, blocks, device):
            raise ValueError(f"{refusal(tokens, rows, columns)}.")
        kernel, per_block, threads = _kernel(capacity, x.dtype, groups, blocks, device)
        arguments = _Arguments(
            x.data_ptr(),
            data.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            tokens,
            columns,
            rows,
            blocks,
            int(scale is not None and scale.numel() > 1),
        )
        stream = torch.cuda.current_stream().cuda_stream
        kernel(-(-rows // per_block), threads, shared, stream, arguments)
    return y


def _capacity(tokens: int) -> int:
    """Tokens of the kernel that is compiled for them: a power of two."""
    return 1 << (tokens - 1).bit_length()


def _codes_bytes(capacity: int, blocks: int) -> int:
    return capacity * 16 * blocks


@cache
def _shape(groups: int, blocks: int, device: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return shape(groups, blocks, properties.multi_processor_count)


@cache
def _room(capacity: int, groups: int, blocks: int, device: int) -> int:
    """Bytes of shared memory that are left for the activations of a product."""
    return _room_beside(capacity, *_shape(groups, blocks, device), device)


def _room_beside(capacity: int, rows: int, threads: int, device: int) -> int:
    return nvrtc.most_shared(device) - _RESERVED - static_bytes(capacity, rows, threads)


@cache
def _kernel(
    tokens: int, dtype: torch.dtype, groups: int, blocks: int, device: int
) -> tuple[nvrtc.Kernel, int, int]:
    rows, threads = _shape(groups, blocks, device)
    return _built(tokens, dtype, rows, threads, device), rows, threads


@cache
def _built(tokens: int, dtype: torch.dtype, rows: int, threads: int, device: int) -> nvrtc.Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    cubin = nvrtc.compiled(source(), options(tokens, dtype, rows, threads), f"sm_{major}{minor}")
    room = _room_beside(tokens, rows, threads, device)
    return nvrtc.Kernel(cubin, "ternary_gemv", overlapped=major >= 9, shared=room)
