"""The Hugging Face row-block byte layout by its definition, one field at a time."""

from __future__ import annotations

import numpy as np

from .arrays import ArrayLike, Int8, UInt8, int64

KNOWN_CODES = ((1,), (0,), (-1,), (0,), (0,), (1,), (-1,), (-1,))
"""One column of eight codes whose bytes were checked against `transformers.pack_weights`."""
KNOWN_BYTES = ((0x12,), (0x25,))
"""2 | 0 << 2 | 1 << 4 | 0 << 6 of rows 0, 2, 4, 6; 1 | 1 << 2 | 2 << 4 | 0 << 6 of the others."""


def pack_row_blocks(codes: ArrayLike) -> UInt8:
    """Packs codes (N, K), N a multiple of 4, into uint8 (N / 4, K).

    Bits 2i and 2i + 1 of byte (r, c) hold code + 1 of row i * (N / 4) + r: each field belongs to
    a block of rows, not to four neighbours.

    Raises:
        ValueError: N is not a multiple of 4, where the layout leaves the missing rows open.
    """
    values = int64(codes)
    rows, columns = values.shape
    if rows % 4:
        raise ValueError(f"{rows} rows; expected a multiple of 4: the layout is undefined between.")
    quarter = rows // 4
    packed = np.zeros((quarter, columns), dtype=np.uint8)
    for row in range(rows):
        packed[row % quarter] += ((values[row] + 1) * 4 ** (row // quarter)).astype(np.uint8)
    return packed


def unpack_row_blocks(packed: ArrayLike, rows: int) -> Int8:
    """Restores the first `rows` codes of `pack_row_blocks` as int8 (rows, K)."""
    fields = int64(packed)
    quarter = fields.shape[0]
    codes = [fields[row % quarter] // 4 ** (row // quarter) % 4 - 1 for row in range(rows)]
    return np.array(codes, dtype=np.int8).reshape(rows, fields.shape[1])
