"""Ternary tensors as the formats pass them on: packed, so that a conversion stays small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forge_harness.errors import NonTernaryCodeError
from forge_harness.quant import pack_i2
from forge_harness.quant.ternary import check_parts

CHUNK_CODES = 1 << 20
"""Codes unpacked at a time: 1 MiB of bytes, 4 MiB of floats, which stay in the cache."""

_CHECKED_BYTES = 1 << 18
"""Packed bytes checked at a time, which stay in the second-level cache with their copy."""


@dataclass(frozen=True, slots=True)
class TernaryTensor:
    """Ternary codes of a weight (N, K), four a byte, and the scales that multiply them.

    Attributes:
        packed: uint8 (ceil(N / 4), K), row blocks: with R = ceil(N / 4), bits 2i and 2i + 1 of
            byte (r, c) hold code + 1 of row i * R + r. Fields of rows beyond N mean nothing.
        rows: N.
        scales: fp32 (P,), one a part.
        parts: Row counts of the parts; they sum to N.
    """

    packed: Tensor
    rows: int
    scales: Tensor
    parts: tuple[int, ...]

    def __post_init__(self) -> None:
        check_parts(self.parts, rows=self.rows)
        if self.scales.shape != (len(self.parts),):
            raise ValueError(
                f"{len(self.parts)} parts with scales of shape {tuple(self.scales.shape)}; "
                "expected one scale a part."
            )

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, parts: tuple[int, ...] | None = None
    ) -> TernaryTensor:
        """Packs int8 codes (N, K); `scales` holds one value, or one a part.

        Raises:
            NonTernaryCodeError: A code is outside -1, 0, +1.
        """
        rows = codes.shape[0]
        return cls(pack_i2(codes), rows, scales.reshape(-1).float(), parts or (rows,))

    @property
    def columns(self) -> int:
        """K."""
        return self.packed.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.rows, self.columns

    def fields(self, start: int, stop: int) -> Tensor:
        """Returns code + 1 of rows start..stop as uint8 (stop - start, K)."""
        quarter = self.packed.shape[0]
        pieces = []
        row = start
        while row < stop:
            field, offset = divmod(row, quarter)
            count = min(stop - row, quarter - offset)
            pieces.append((self.packed[offset : offset + count] >> (2 * field)) & 3)
            row += count
        return pieces[0] if len(pieces) == 1 else torch.cat([self.packed[:0], *pieces])

    def codes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns the codes of rows start..stop as int8 (stop - start, K)."""
        return self.fields(start, self.rows if stop is None else stop).to(torch.int8) - 1

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yields (start, stop) of runs of rows that hold about `CHUNK_CODES` codes."""
        yield from row_chunks(self.rows, self.columns)

    def row_scales(self) -> Tensor:
        """Returns the scale of each row, fp32 (N, 1)."""
        return torch.repeat_interleave(self.scales, torch.tensor(self.parts))[:, None]

    def split(self) -> list[TernaryTensor]:
        """Returns one tensor a part, each with its own scale."""
        if len(self.parts) == 1:
            return [self]
        pieces, start = [], 0
        for rows, scale in zip(self.parts, self.scales, strict=True):
            packer = RowBlockPacker(rows, self.columns)
            for first, last in row_chunks(rows, self.columns):
                packer.add(self.fields(start + first, start + last))
            pieces.append(packer.finish(scale))
            start += rows
        return pieces


class RowBlockPacker:
    """Packs codes that arrive in runs of rows, in order, without holding them unpacked.

    Args:
        rows: N of the whole tensor.
        columns: K.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.packed = torch.zeros(-(-rows // 4), columns, dtype=torch.uint8)
        for row in range(rows, 4 * self.packed.shape[0]):
            # As `pack_i2` does: code 0, so that a reader that takes the row anyway adds nothing.
            self.packed[row % self.packed.shape[0]] |= 1 << (2 * (row // self.packed.shape[0]))
        self.rows = rows
        self._next = 0

    def add(self, fields: Tensor) -> None:
        """Takes code + 1 of the next rows, uint8 (n, K) of 0, 1, 2."""
        quarter = self.packed.shape[0]
        done = 0
        while done < fields.shape[0]:
            field, offset = divmod(self._next, quarter)
            count = min(fields.shape[0] - done, quarter - offset)
            self.packed[offset : offset + count] |= fields[done : done + count] << (2 * field)
            done += count
            self._next += count

    def finish(self, scales: Tensor, parts: tuple[int, ...] | None = None) -> TernaryTensor:
        """Returns the tensor once all rows were added."""
        if self._next != self.rows:
            raise ValueError(f"{self._next} of {self.rows} rows were added.")
        return TernaryTensor(
            self.packed, self.rows, scales.reshape(-1).float(), parts or (self.rows,)
        )


def row_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of runs of rows that hold about `CHUNK_CODES` codes each."""
    step = max(1, CHUNK_CODES // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def check_packed_fields(packed: Tensor) -> None:
    """Refuses a field that stands for no code.

    Args:
        packed: uint8 (R, K), row blocks.

    Raises:
        NonTernaryCodeError: With row, column, byte index and bits of the first bad field.
    """
    flat = packed.contiguous().flatten().numpy()
    for start in range(0, flat.size, _CHECKED_BYTES):
        chunk = flat[start : start + _CHECKED_BYTES]
        words = chunk.view(np.uint64) if chunk.size % 8 == 0 else chunk
        both = words >> words.dtype.type(1)
        both &= words
        both &= words.dtype.type(0x5555555555555555 & np.iinfo(words.dtype).max)
        if both.any():
            byte = start + int(both.view(np.uint8).astype(bool).argmax())
            raise NonTernaryCodeError(_code3(packed, byte))


def _code3(packed: Tensor, byte: int) -> str:
    quarter, columns = packed.shape
    row, column = divmod(byte, columns)
    field = next(i for i in range(4) if int(packed[row, column]) >> (2 * i) & 3 == 3)
    return (
        f"code 3 at row {field * quarter + row}, column {column} (bits {2 * field} and "
        f"{2 * field + 1} of byte {byte} of the tensor); expected 0, 1 or 2 for -1, 0, +1"
    )
