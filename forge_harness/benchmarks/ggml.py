"""ggml's TQ2_0 product as a peer, from a build of ggml given by path.

The library is driven through its public C interface: a graph of one `ggml_mul_mat`, planned once
and computed on a thread pool of its own. What it returns is held against the format's definition
(ggml-quants.c, `quantize_row_q8_K_ref` and `dequantize_row_tq2_0`) before anything is timed.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_bool,
    c_char,
    c_float,
    c_int,
    c_int64,
    c_size_t,
    c_uint8,
    c_void_p,
)
from pathlib import Path

import torch
from torch import Tensor

from forge_harness.errors import UsageError

_F32, _TQ2_0 = 0, 35
BLOCK = 256
"""Columns a block of TQ2_0 and of Q8_K covers."""
_TOLERANCE = 1e-3
_ROOM = 2**20
"""Bytes of a context beyond its tensors: their heads and the graph."""


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Plan(Structure):
    # Returned through memory of ours; the tail leaves room for fields other versions add.
    _fields_ = (("work_size", c_size_t), ("work_data", c_void_p), ("_rest", c_char * 240))


class _PoolParams(Structure):
    _fields_ = (("_all", c_char * 1024),)


class GgmlLibrary:
    """A loaded build of ggml.

    Args:
        path: `libggml-cpu.so`, or a directory it and `libggml-base.so` are somewhere under.

    Raises:
        UsageError: There is no such library, or it cannot be loaded or lacks a function.
    """

    def __init__(self, path: Path) -> None:
        # A name without a directory would be looked for in those of the system.
        path = path.absolute()
        cpu = _find(path, "libggml-cpu.so")
        base = _find(cpu.parent if path.is_file() else path, "libggml-base.so")
        try:
            self.base = ctypes.CDLL(str(base), mode=ctypes.RTLD_GLOBAL)
            self.cpu = ctypes.CDLL(str(cpu))
            self._declare()
        except (OSError, AttributeError) as error:
            raise UsageError(
                f"{cpu} cannot be used as ggml: {error}; expected a shared build with TQ2_0 "
                "(cmake -DBUILD_SHARED_LIBS=ON, release of 2024-09 or newer)."
            ) from error
        self.path = cpu
        self.cpu.ggml_cpu_init()

    def product(self, weight: Tensor, x: Tensor, threads: int) -> GgmlProduct:
        """Returns the product of `x` (M, K) fp32 with `weight` (N, K) fp32, K of whole blocks."""
        return GgmlProduct(self, weight, x, threads)

    def _declare(self) -> None:
        base, cpu = self.base, self.cpu
        base.ggml_init.argtypes, base.ggml_init.restype = [_InitParams], c_void_p
        base.ggml_free.argtypes = [c_void_p]
        base.ggml_new_tensor_2d.argtypes = [c_void_p, c_int, c_int64, c_int64]
        base.ggml_mul_mat.argtypes = [c_void_p] * 3
        base.ggml_get_data.argtypes = [c_void_p]
        base.ggml_new_graph.argtypes = [c_void_p]
        for name in ("ggml_new_tensor_2d", "ggml_mul_mat", "ggml_get_data", "ggml_new_graph"):
            getattr(base, name).restype = c_void_p
        base.ggml_build_forward_expand.argtypes = [c_void_p, c_void_p]
        base.ggml_row_size.argtypes, base.ggml_row_size.restype = [c_int, c_int64], c_size_t
        chunk = base.ggml_quantize_chunk
        chunk.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
        chunk.restype = c_size_t
        default = base.ggml_threadpool_params_default
        default.argtypes, default.restype = [c_int], _PoolParams
        cpu.ggml_threadpool_new.argtypes = [POINTER(_PoolParams)]
        cpu.ggml_threadpool_new.restype = c_void_p
        cpu.ggml_threadpool_free.argtypes = [c_void_p]
        cpu.ggml_graph_plan.argtypes = [c_void_p, c_int, c_void_p]
        cpu.ggml_graph_plan.restype = _Plan
        cpu.ggml_graph_compute.argtypes = [c_void_p, POINTER(_Plan)]


class GgmlProduct:
    """One planned product; calling it computes and returns (M, N) fp32, overwritten next time.

    Close it: the context and the thread pool belong to the library.

    Args:
        library: Where the product runs.
        weight: (N, K) fp32; ternary in each block of 256.
        x: (M, K) fp32.
        threads: Of the library's pool.

    Raises:
        UsageError: K is no multiple of 256.
    """

    def __init__(self, library: GgmlLibrary, weight: Tensor, x: Tensor, threads: int) -> None:
        (rows, columns), tokens = weight.shape, len(x)
        if columns % BLOCK:
            raise UsageError(f"ggml's TQ2_0 needs whole blocks of 256 columns, not {columns}.")
        base, self._library = library.base, library
        row_bytes = base.ggml_row_size(_TQ2_0, columns)
        size = rows * row_bytes + 4 * tokens * (columns + rows) + _ROOM
        self._context = base.ggml_init(_InitParams(size, None, False))
        a = base.ggml_new_tensor_2d(self._context, _TQ2_0, columns, rows)
        b = base.ggml_new_tensor_2d(self._context, _F32, columns, tokens)
        y = base.ggml_mul_mat(self._context, a, b)
        self._graph = base.ggml_new_graph(self._context)
        base.ggml_build_forward_expand(self._graph, y)
        weight, x = weight.float().contiguous(), x.float().contiguous()
        data = base.ggml_get_data(a)
        base.ggml_quantize_chunk(_TQ2_0, weight.data_ptr(), data, 0, rows, columns, None)
        ctypes.memmove(base.ggml_get_data(b), x.data_ptr(), x.nbytes)
        pool = base.ggml_threadpool_params_default(threads)
        self._pool = library.cpu.ggml_threadpool_new(byref(pool))
        self._plan = library.cpu.ggml_graph_plan(self._graph, threads, self._pool)
        self._work = (c_uint8 * max(1, self._plan.work_size))()
        self._plan.work_data = ctypes.addressof(self._work)
        memory = (c_float * (tokens * rows)).from_address(base.ggml_get_data(y))
        self._result = torch.frombuffer(memory, dtype=torch.float32).view(tokens, rows)

    def __call__(self) -> Tensor:
        """Computes the graph."""
        self._library.cpu.ggml_graph_compute(self._graph, byref(self._plan))
        return self._result

    def close(self) -> None:
        """Frees the context and ends the threads; the result's memory goes with it."""
        if self._context:
            self._library.cpu.ggml_threadpool_free(self._pool)
            self._library.base.ggml_free(self._context)
            self._context = None


def checked(product: GgmlProduct, weight: Tensor, x: Tensor) -> GgmlProduct:
    """Returns the product, once what it computes is what its format says.

    Raises:
        UsageError: It is further than 0.1 % off; one rounding the other way costs a tenth of that.
    """
    expected = defined_product(weight, x)
    off = float((product().double() - expected).norm() / expected.norm())
    if not off < _TOLERANCE:
        product.close()
        raise UsageError(
            f"The ggml library is {off:.1e} off what TQ2_0 defines, over {_TOLERANCE:g}; "
            "it computes something else, so it is not timed. Give another build."
        )
    return product


def defined_product(weight: Tensor, x: Tensor) -> Tensor:
    """Returns what the format says TQ2_0 times Q8_K is, (M, N) float64.

    A block of 256 weights is its largest magnitude, rounded to fp16, times codes; a block of 256
    activations is quantized by -127 over its entry of largest magnitude, half to even.

    Args:
        weight: (N, K), ternary in each block.
        x: (M, K), no block all zero.
    """
    blocks = weight.float().view(len(weight), -1, BLOCK)
    d = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks / d.clamp_min(1e-30)).round()
    w = (codes.double() * d.half().double()).flatten(1)
    parts = x.float().view(len(x), -1, BLOCK)
    largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    inverse = -127.0 / largest
    q = (inverse * parts).round().clamp_max(127)
    return (q.double() / inverse.double()).flatten(1) @ w.t()


def _find(path: Path, name: str) -> Path:
    if path.is_file():
        return path
    found = sorted(path.rglob(name)) if path.is_dir() else []
    if not found:
        raise UsageError(f"{path} holds no {name}; expected a build directory of ggml.")
    return found[0]
