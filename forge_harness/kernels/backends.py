"""Which backend, and which instruction set, runs an op; free of torch, so that asking is cheap."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, Literal

from forge_harness.errors import BackendUnavailableError, unknown_choice

Backend = Literal["auto", "reference", "native", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "native", "triton", "cuda")
PATH_VARIABLE = "FORGE_KERNELS_PATH"
"""Environment variable that names the instruction set of the native products."""

TILE_PATHS = ("amx-int8",)
"""Instruction sets that multiply tiles of sixteen tokens."""

OPS: dict[str, tuple[str, ...]] = {
    "pack_i2": ("native", "reference"),
    "unpack_i2": ("native", "reference"),
    "pack_blocks": ("native", "reference"),
    "unpack_blocks": ("native", "reference"),
    "encode_tq": ("native", "reference"),
    "decode_tq": ("native", "reference"),
    "quantize_activations": ("triton", "native", "reference"),
    "ternary_matmul": ("cuda", "triton", "native", "reference"),
    "ternary_linear": ("cuda", "triton", "native", "reference"),
}
"""Op -> the backends that implement it, fastest first."""

MOST_CUDA_TOKENS = 8
"""The CUDA kernel is for decoding; more tokens are a matrix product, which Triton has."""

_REBUILD = "reinstall the package with a C++17 compiler at hand (pip install -e .)"


_default_path: str | None = None
_checked_paths: set[str] = set()


def native() -> Any:  # noqa: ANN401 - the module, imported late
    """Returns the extension module."""
    from forge_kernels import _native

    return _native


def native_problem() -> str:
    """Returns why the native extension cannot be used, or "" when it can."""
    try:
        importlib.import_module("forge_kernels._native")
    except ImportError as error:
        return str(error)
    return ""


def native_version() -> str | None:
    """Returns the version compiled into the native extension, or None without it."""
    if native_problem():
        return None
    return str(native().__version__)


def cpu_paths() -> tuple[str, ...]:
    """Returns the instruction sets the native products can use here, fastest first.

    Raises:
        BackendUnavailableError: The extension is not there.
    """
    if problem := _native_refusal("ternary_linear", "cpu"):
        raise BackendUnavailableError(problem)
    return tuple(native().paths())


def cpu_path(path: str | None = None) -> str:
    """Returns the instruction set a native product uses: the given, the environment's, the fastest.

    The environment is read here and by the first product; a change after that counts once this has
    been called again.

    Args:
        path: One of `cpu_paths()`; None: what `FORGE_KERNELS_PATH` says, or the fastest.

    Raises:
        BackendUnavailableError: The extension is not there, or the path that was asked for does
            not run here: the processor lacks it, the system refuses it (tiles of AMX), or the
            compiler that built the extension did not know it.
    """
    global _default_path
    available = cpu_paths()
    wanted = os.environ.get(PATH_VARIABLE) or available[0] if path is None else path
    if wanted not in available:
        source = f" (from {PATH_VARIABLE})" if path is None else ""
        raise BackendUnavailableError(
            f"Kernel path {wanted!r}{source} does not run here: processor, system and build allow "
            f"{', '.join(map(repr, available))}."
        )
    if path is None:
        _default_path = wanted
    return wanted


def product_path(path: str | None) -> str:
    """Returns `cpu_path(path)`, without asking again what was asked for an earlier product."""
    if path is None:
        return _default_path or cpu_path()
    if path not in _checked_paths:
        _checked_paths.add(cpu_path(path))
    return path


_loaded = sys.modules.get


def native_if_loaded() -> Any:  # noqa: ANN401 - as `native`
    """Returns the extension module if something imported it; cheap enough for each product."""
    return _loaded("forge_kernels._native")


def which(
    op: str,
    backend: Backend = "auto",
    *,
    device: str = "cpu",
    tokens: int = 1,
    weight: tuple[int, int] | None = None,
) -> str:
    """Returns the backend that runs `op` on tensors of device type `device`.

    Args:
        op: A key of `OPS`.
        backend: "auto", or an explicit choice, which is then checked.
        device: torch device type of the arguments.
        tokens: Rows of activations; the CUDA kernel takes few.
        weight: (N, K), where known; the CUDA kernel takes no rows that are too long for the GPU.

    Raises:
        BackendUnavailableError: The explicit choice cannot run there.
        ValueError: `op` or `backend` is unknown.
    """
    if op not in OPS:
        raise ValueError(unknown_choice("kernel", op, OPS))
    if backend not in BACKENDS:
        raise ValueError(unknown_choice("kernel backend", backend, BACKENDS))
    if backend != "auto":
        if problem := _refusal(op, backend, device, tokens, weight):
            raise BackendUnavailableError(problem)
        return backend
    # Triton's interpreter is for looking into kernels: nobody who multiplies means it by "auto".
    fast = (b for b in OPS[op] if (b, device) != ("triton", "cpu"))
    return next(b for b in fast if not _refusal(op, b, device, tokens, weight))


def _refusal(
    op: str, backend: str, device: str, tokens: int, weight: tuple[int, int] | None
) -> str:
    """Returns the sentence that says why a backend cannot run `op` on `device`, or ""."""
    if backend == "reference":
        return ""
    if backend not in OPS[op]:
        return f"{op} has no {backend} implementation; choose backend='reference' or 'auto'."
    if backend == "native":
        return _native_refusal(op, device)
    if backend == "cuda" and tokens > MOST_CUDA_TOKENS:
        return (
            f"The CUDA kernel takes up to {MOST_CUDA_TOKENS} tokens, not {tokens}; choose "
            "'triton' or 'auto'."
        )
    problem = _gpu_refusal(op, backend, device)
    if problem or backend != "cuda" or weight is None or tokens < 1:
        return problem
    why: str = importlib.import_module("forge_kernels.cuda").refusal(tokens, *weight)
    return f"cuda {op} cannot run: {why}." if why else ""


def _native_refusal(op: str, device: str) -> str:
    if device != "cpu":
        return f"native {op} runs on CPU, not on {device}; move the tensor or choose 'reference'."
    problem = native_problem()
    if problem:
        return f"The native kernels cannot be loaded ({problem}); {_REBUILD} or choose 'reference'."
    return ""


def _gpu_refusal(op: str, backend: str, device: str) -> str:
    if device == "cpu" and (backend == "cuda" or os.environ.get("TRITON_INTERPRET") != "1"):
        return f"{backend} {op} runs on a GPU, not on cpu; move the tensors or choose 'auto'."
    try:
        module = importlib.import_module(f"forge_kernels.{backend}")
    except ImportError as error:
        return f"The {backend} kernels cannot be loaded ({error}); choose 'reference'."
    problem: str = module.problem(device)
    return f"{backend} {op} cannot run on {device}: {problem}" if problem else ""
