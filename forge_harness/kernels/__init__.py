"""One typed entry to every kernel: checks arguments once, picks a backend, says which one ran.

Backends are `reference` (plain torch, any device), `native` (the C++ extension, CPU), `triton` and
`cuda` (GPUs; CUDA for NVIDIA only). `auto` takes the fastest one that is there and `which` tells
which that is. An explicitly chosen backend never falls back: it is an error with the remedy. Within
`native`, the instruction set ("path") is the fastest the processor has; `FORGE_KERNELS_PATH` or an
argument overrides it, and `cpu_path` tells which it is.

Two layouts of packed codes:

* "i2-rowblock", in files (`pack_i2`): that of the Hugging Face packed BitNet checkpoints. With
  R = ceil(N / 4), bits 2i and 2i + 1 of byte (r, c) hold code (i * R + r, c) + 1. Fields past row N
  are written as code 0 and are not looked at when unpacking. (transformers leaves them at -1, and
  cannot load such layers again; with 0 a reader that ignores N gets rows of zeros instead of minus
  the sum of its inputs.)
* "i2-64x16", in memory (`pack`): what every backend multiplies with; see `forge_kernels/layout.py`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .backends import (
    BACKENDS,
    OPS,
    PATH_VARIABLE,
    Backend,
    cpu_path,
    cpu_paths,
    native_problem,
    native_version,
    which,
)

if TYPE_CHECKING:
    from .ops import quantize_activations, ternary_linear, ternary_matmul
    from .packed import LAYOUT, MAX_COLUMNS, PackedTernary, pack, pack_stored, unpack
    from .packing import pack_i2, unpack_i2

__all__ = [
    "BACKENDS",
    "LAYOUT",
    "MAX_COLUMNS",
    "OPS",
    "PATH_VARIABLE",
    "Backend",
    "PackedTernary",
    "cpu_path",
    "cpu_paths",
    "native_problem",
    "native_version",
    "pack",
    "pack_i2",
    "pack_stored",
    "quantize_activations",
    "ternary_linear",
    "ternary_matmul",
    "unpack",
    "unpack_i2",
    "which",
]

_MODULES = {
    "ops": ("quantize_activations", "ternary_linear", "ternary_matmul"),
    "packed": ("LAYOUT", "MAX_COLUMNS", "PackedTernary", "pack", "pack_stored", "unpack"),
    "packing": ("pack_i2", "unpack_i2"),
}
"""Modules that import torch, which asking for backends must not."""


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            value: object = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
