"""The packed layout "i2-64x16" in plain torch: what every backend reads, written to be read.

uint8 (G, B, 256) with G = ceil(N / 64), B = ceil(K / 16). Block (g, b) holds rows 64g .. 64g + 63
and columns 16b .. 16b + 15 as 64 little-endian words of 32 bits: word r is row 64g + r, and bits 2f
and 2f + 1 of its byte j hold code + 1 of column 16b + 4f + j. Padding holds code 0.

A 32-bit lane is a row, so no backend sums across lanes; a byte's four fields multiply four runs of
four activations; and a thread, or a warp, reads its rows as one forward stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import refuse_first

ROWS = 64
COLUMNS = 16
BYTES = 256


def blocks_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """Returns (G, B, 256) of a weight (rows, columns)."""
    return -(-rows // ROWS), -(-columns // COLUMNS), BYTES


def pack_blocks(codes: Tensor) -> Tensor:
    """Packs int8 codes (N, K) into uint8 (G, B, 256).

    Raises:
        ValueError: A code is outside -1, 0, +1.
    """
    refuse_first(
        (codes < -1) | (codes > 1),
        codes,
        "code {value} at row {row}, column {column} is not -1, 0 or +1",
    )
    rows, columns = codes.shape
    groups, blocks, _ = blocks_shape(rows, columns)
    padded = F.pad(codes, (0, blocks * COLUMNS - columns, 0, groups * ROWS - rows))
    # (group, row, block, field, byte) -> (group, block, row, byte, field)
    fields = (padded + 1).to(torch.uint8).reshape(groups, ROWS, blocks, 4, 4)
    fields = fields.permute(0, 2, 1, 4, 3)
    packed = fields[..., 0].clone()
    for field in range(1, 4):
        packed |= fields[..., field] << (2 * field)
    return packed.reshape(groups, blocks, BYTES)


def unpack_blocks(data: Tensor, rows: int, columns: int) -> Tensor:
    """Restores int8 codes (rows, columns); padding is not looked at.

    Raises:
        ValueError: A field holds 3, which stands for no code.
    """
    groups, blocks, _ = data.shape
    words = data.reshape(groups, blocks, ROWS, 4)
    fields = torch.stack([(words >> (2 * field)) & 3 for field in range(4)], dim=3)
    # (group, block, row, field, byte) -> rows by columns
    fields = fields.permute(0, 2, 1, 3, 4).reshape(groups * ROWS, blocks * COLUMNS)
    fields = fields[:rows, :columns]
    refuse_first(
        fields == 3, fields, "field {value} at row {row}, column {column} stands for no code"
    )
    return fields.to(torch.int8) - 1
