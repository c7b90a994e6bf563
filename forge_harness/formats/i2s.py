"""I2_S, bitnet.cpp's ternary tensors: three byte layouts under one type id and no marker.

A tensor of n = N * K values is n / 4 bytes of fields code + 1, then 32 bytes whose first four are
its scale, fp32. Sources: `quantize_i2_s` in bitnet.cpp's `ggml-bitnet-mad.cpp`, `quantize_to_i2_s`
in its `convert-hf-to-gguf-bitnet.py`.

* x86-act: 128 values in 32 bytes; value j at byte j mod 32, bits 6 - 2 * (j div 32).
* arm: 64 values in 16 bytes; value j at byte j mod 16, bits 6 - 2 * (j div 16).
* x86-rows: four rows in K bytes; row j at bits 6 - 2 * (j mod 4) of byte (j div 4) * K + column.

Values of the first two run on over the ends of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from forge_harness.errors import NonTernaryCodeError

from .checkpoint import I2SLayout
from .gguf_types import I2_S_TAIL
from .tensors import CHUNK_CODES, RowBlockPacker, TernaryTensor

LAYOUTS: tuple[I2SLayout, ...] = ("x86-act", "arm", "x86-rows")
_WIDTHS = {"x86-act": 32, "arm": 16}


def obstacle(layout: I2SLayout, rows: int, columns: int) -> str | None:
    """Says why a tensor (N, K) cannot have a layout; None when it can."""
    if layout == "x86-rows":
        return f"{rows} rows are no multiple of 4" if rows % 4 else None
    values = 4 * _WIDTHS[layout]
    if rows * columns % values:
        return f"{rows * columns} values are no multiple of {values}"
    return None


def decode(
    layout: I2SLayout, rows: int, columns: int, read: Callable[[int, int], bytearray]
) -> TernaryTensor:
    """Reads a tensor (N, K).

    Args:
        layout: One that `obstacle` has nothing against.
        rows: N.
        columns: K.
        read: Returns bytes start..stop of the tensor.

    Raises:
        NonTernaryCodeError: With byte and bits of the first field 3.
    """
    packer = RowBlockPacker(rows, columns)
    for start, stop in _row_runs(layout, rows, columns):
        first, last = start * columns // 4, stop * columns // 4
        packed = torch.frombuffer(read(first, last), dtype=torch.uint8)
        _refuse_illegal(packed, first)
        packer.add(_fields(layout, packed, columns))
    end = rows * columns // 4
    scale = torch.frombuffer(read(end, end + I2_S_TAIL), dtype=torch.float32)[0]
    return packer.finish(scale)


def _fields(layout: I2SLayout, packed: Tensor, columns: int) -> Tensor:
    width = columns if layout == "x86-rows" else _WIDTHS[layout]
    groups = packed.reshape(-1, width)
    fields = torch.empty(groups.shape[0], 4, width, dtype=torch.uint8)
    for j in range(4):
        torch.bitwise_right_shift(groups, 6 - 2 * j, out=fields[:, j])
    fields &= 3
    return fields.reshape(-1, columns)


def _row_runs(layout: I2SLayout, rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yields runs of rows that hold whole groups of bytes, and about `CHUNK_CODES` codes."""
    values = 4 * columns if layout == "x86-rows" else 4 * _WIDTHS[layout]
    whole = values // math.gcd(values, columns)
    step = max(1, CHUNK_CODES // (whole * columns)) * whole
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _refuse_illegal(packed: Tensor, first: int) -> None:
    bad = packed & (packed >> 1) & 0x55
    if bad.any():
        byte = int(bad.ne(0).int().argmax())
        bits = next(shift for shift in (6, 4, 2, 0) if int(bad[byte]) >> shift & 1)
        raise NonTernaryCodeError(
            f"code 3 in bits {bits} and {bits + 1} of byte {first + byte} of the tensor; expected "
            "0, 1 or 2 for -1, 0, +1"
        )
