"""TQ1_0 and TQ2_0, ggml's ternary blocks of 256 values, streamed in runs of rows.

The blocks themselves are made and read by `forge_harness.kernels.tq`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forge_harness.errors import NonTernaryCodeError
from forge_harness.kernels.tq import (
    BLOCK,
    TQ1,
    TQ2,
    Layout,
    decode_tq,
    encode_tq,
    legal_bytes,
    scales_of,
    zero_blocks,
)

from .gguf_types import TQ1_0, TQ2_0
from .tensors import TernaryTensor

__all__ = ["BLOCK", "decode", "encode", "row_bytes"]

Bytes: TypeAlias = NDArray[np.uint8]
_CHUNK_BYTES = 1 << 20
"""Bytes of row-block codes worked on at a time: with their blocks they stay in the cache."""
_LAYOUTS: dict[int, Layout] = {TQ1_0: TQ1, TQ2_0: TQ2}


def row_bytes(kind: int, columns: int) -> int:
    """Bytes of a row of blocks that holds `columns` values, padded to whole blocks."""
    return -(-columns // BLOCK) * _LAYOUTS[kind].nbytes


def encode(kind: int, tensor: TernaryTensor, d: int) -> Iterator[tuple[int, Bytes]]:
    """Turns a tensor into rows of blocks, in runs of rows that arrive in four interleaved streams.

    Columns are padded with code 0 to a multiple of 256. A block without a nonzero code gets d = 0,
    as ggml's quantizer does.

    Args:
        kind: `TQ1_0` or `TQ2_0`.
        tensor: The codes; its scales are not looked at.
        d: Bits of the fp16 scale of every other block.

    Yields:
        First row, and uint8 (rows, bytes a row).

    Raises:
        NonTernaryCodeError: A field of the tensor holds 3.
    """
    layout = _LAYOUTS[kind]
    packed, columns = tensor.packed.numpy(), tensor.columns
    quarter = packed.shape[0]
    for start, stop in _row_runs(quarter, columns):
        blocks, sound = encode_tq(layout, packed[start:stop], d)
        if not sound:
            _refuse_illegal_fields(packed[start:stop], tensor.rows, quarter, start)
        for field in range(4):
            first = field * quarter + start
            rows = min(tensor.rows - first, stop - start)
            if rows > 0:
                yield first, blocks[field].reshape(stop - start, -1)[:rows]


def decode(
    kind: int, rows: int, columns: int, read: Callable[[int, int], bytearray]
) -> tuple[Tensor, NDArray[np.uint16], NDArray[np.bool_]]:
    """Turns rows of blocks into row-block codes.

    Args:
        kind: `TQ1_0` or `TQ2_0`.
        rows: N.
        columns: K, a multiple of 256.
        read: Returns the bytes of rows start..stop.

    Returns:
        packed: uint8 (ceil(N / 4), K), as in `TernaryTensor`; fields of rows beyond N hold code 0.
        d: uint16 (N, K / 256), the bits of each block's fp16 scale.
        zero: bool (N, K / 256), whether a block has no nonzero code.

    Raises:
        NonTernaryCodeError: With row, block and byte of a byte that stands for no codes.
    """
    layout = _LAYOUTS[kind]
    blocks_a_row = columns // BLOCK
    quarter = -(-rows // 4)
    packed = np.empty((quarter, columns), np.uint8)
    scales = np.empty((rows, blocks_a_row), np.uint16)
    zero = np.empty((rows, blocks_a_row), np.bool_)
    padding = np.array([*layout.zero, 0, 0], np.uint8)
    for start, stop in _row_runs(quarter, columns):
        blocks = np.empty((4, stop - start, blocks_a_row, layout.nbytes), np.uint8)
        for field in range(4):
            first = field * quarter + start
            count = max(0, min(rows - first, stop - start))
            blocks[field, count:] = padding
            if count:
                found = np.frombuffer(read(first, first + count), np.uint8)
                blocks[field, :count] = found.reshape(count, blocks_a_row, -1)
                flat = blocks[field, :count].reshape(-1, layout.nbytes)
                scales[first : first + count] = scales_of(layout, flat).reshape(count, -1)
                zero[first : first + count] = zero_blocks(layout, flat).reshape(count, -1)
        if not decode_tq(layout, blocks, packed[start:stop]):
            for field in range(4):
                _refuse_illegal_bytes(layout, blocks[field], field * quarter + start)
    return torch.from_numpy(packed), scales, zero


def _refuse_illegal_fields(packed: Bytes, rows: int, quarter: int, start: int) -> None:
    """Refuses field 3 in packed rows start.. of a tensor, but for rows beyond its last."""
    bad = packed & (packed >> 1) & 0x55
    if not bad.any():
        return
    for field in range(4):
        valid = bad[: max(0, rows - field * quarter - start)] >> (2 * field) & 1
        if valid.any():
            row, column = divmod(int(valid.argmax()), packed.shape[1])
            raise NonTernaryCodeError(
                f"code 3 at row {field * quarter + start + row}, column {column}; expected 0, 1 "
                "or 2 for -1, 0, +1"
            )


def _refuse_illegal_bytes(layout: Layout, blocks: Bytes, first: int) -> None:
    """Names the first byte of blocks (rows, blocks a row, nbytes) that stands for no codes."""
    for section in layout.sections:
        legal = legal_bytes(layout, section.digits)
        end = section.first_byte + section.width
        bad = ~legal[blocks[..., section.first_byte : end]]
        if bad.any():
            row, block, byte = (int(i) for i in np.argwhere(bad)[0])
            byte += section.first_byte
            raise NonTernaryCodeError(
                f"0x{blocks[row, block, byte]:02x}, which stands for no codes, in byte {byte} of "
                f"block {block} of row {first + row}"
            )


def _row_runs(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_BYTES // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
