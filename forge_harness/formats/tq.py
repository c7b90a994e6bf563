"""TQ1_0 and TQ2_0, ggml's ternary blocks of 256 values, four rows at a time.

Layouts: ggml's `ggml-quants.c` (`quantize_row_tq1_0_ref`, `quantize_row_tq2_0_ref`). A block holds
codes and one fp16 d; value = code * d.

* TQ2_0, 66 bytes: half h of the block is bytes 32h .. 32h + 31; bits 2l and 2l + 1 of byte m hold
  code + 1 of value 128h + 32l + m; then d.
* TQ1_0, 54 bytes: five values a byte as ceil(v * 256 / 243), v = sum of (code + 1) * 3**(4 - n):
  bytes 0 .. 31 hold values 32n + m, bytes 32 .. 47 values 160 + 16n + m, n = 0..4; bytes 48 .. 51
  hold values 240 + 4n + m, n = 0..3, and a fifth digit of 0; then d.

Both ways the work is a transposition: byte (r, c) of a row-block tensor holds one column of four
rows, a byte of a block four columns of one row. It is done on words of 8 bytes at a time, with
two exchanges instead of sixteen shifts, and 256-entry tables turn four 2-bit fields into base 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forge_harness.errors import NonTernaryCodeError

from .gguf_types import TQ1_0, TQ2_0
from .tensors import TernaryTensor

Bytes: TypeAlias = NDArray[np.uint8]
BLOCK = 256
_CHUNK_BYTES = 1 << 18
"""Bytes of row-block codes worked on at a time: with its copies it stays in the second-level
cache, and small tables of Python stay cheap beside it."""
_ZERO_CODES = 0x55
"""Four fields of code 0."""


@dataclass(frozen=True, slots=True)
class _Section:
    """A run of block bytes that share a layout: `digits` runs of `width` values."""

    first_byte: int
    first_value: int
    width: int
    digits: int


@dataclass(frozen=True, slots=True)
class _Layout:
    nbytes: int
    sections: tuple[_Section, ...]
    zero: tuple[int, ...]
    """Code bytes of a block of zeros."""


_LAYOUTS = {
    TQ2_0: _Layout(66, (_Section(0, 0, 32, 4), _Section(32, 128, 32, 4)), (0x55,) * 64),
    TQ1_0: _Layout(
        54,
        (_Section(0, 0, 32, 5), _Section(32, 160, 16, 5), _Section(48, 240, 4, 4)),
        (0x80,) * 48 + (0x7F,) * 4,
    ),
}


def _digits(byte: int) -> tuple[int, ...]:
    return tuple(byte >> (2 * n) & 3 for n in range(4))


def _base3(byte: int) -> int:
    """The four fields of a byte as a number of base 3, times 3; anything where a field is 3."""
    a, b, c, d = _digits(byte)
    return (81 * a + 27 * b + 9 * c + 3 * d) % 256


def _ceiling(value: int) -> int:
    return -(-value * 256 // 243) % 256


def _inverse(values: range) -> tuple[bytes, bytes]:
    """Tables: block byte -> four fields (illegal: all 3), and -> the fifth digit."""
    fields, fifth = bytearray(b"\xff" * 256), bytearray(256)
    for value in values:
        digits = [value // 3 ** (4 - n) % 3 for n in range(5)]
        fields[_ceiling(value)] = sum(digit << (2 * n) for n, digit in enumerate(digits[:4]))
        fifth[_ceiling(value)] = digits[4]
    return bytes(fields), bytes(fifth)


_BASE3 = bytes(_base3(byte) for byte in range(256))
_CEILING = bytes(_ceiling(value) for value in range(256))
_FOUR_DIGITS = _BASE3.translate(_CEILING)
_FIELDS5, _FIFTH = _inverse(range(243))
_FIELDS4, _ = _inverse(range(0, 243, 3))
_LEGAL = {
    (TQ2_0, 4): np.array([3 not in _digits(byte) for byte in range(256)]),
    (TQ1_0, 5): np.array([fields != 0xFF for fields in _FIELDS5]),
    (TQ1_0, 4): np.array([fields != 0xFF for fields in _FIELDS4]),
}
"""Which bytes stand for codes, by type and digits a byte."""


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
    blocks_a_row = -(-columns // BLOCK)
    for start, stop in _row_runs(quarter, columns):
        _refuse_illegal_fields(packed[start:stop], tensor.rows, quarter, start)
        chunk = _padded(packed[start:stop], blocks_a_row * BLOCK)
        blocks = _encode_blocks(kind, layout, chunk.reshape(-1, BLOCK))
        nonzero = ~_zero_blocks(layout, blocks.reshape(-1, layout.nbytes))
        _d(layout, blocks)[...] = np.where(nonzero.reshape(blocks.shape[:2]), d, 0)
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
                scales[first : first + count] = _d(layout, flat).reshape(count, -1)
                zero[first : first + count] = _zero_blocks(layout, flat).reshape(count, -1)
        sound = _decode_blocks(
            kind,
            layout,
            blocks.reshape(4, -1, layout.nbytes),
            packed[start:stop].reshape(-1, BLOCK),
        )
        if not sound:
            for field in range(4):
                _refuse_illegal_bytes(kind, layout, blocks[field], field * quarter + start)
    return torch.from_numpy(packed), scales, zero


def _encode_blocks(kind: int, layout: _Layout, values: Bytes) -> Bytes:
    """Four rows of blocks (4, n, nbytes) from bytes (n, 256) that hold a column of four rows."""
    blocks = np.empty((4, len(values), layout.nbytes), np.uint8)
    for section in layout.sections:
        fields = np.empty((4, len(values)), f"V{section.width}")
        for n in range(4):
            fields[n] = _run(values, section.first_value + n * section.width, section.width)
        _transpose(fields)
        if kind == TQ1_0:
            fields = _base3_bytes(fields, values, section)
        for row in range(4):
            _run(blocks[row], section.first_byte, section.width)[:] = fields[row]
    return blocks


def _base3_bytes(fields: NDArray[np.void], values: Bytes, section: _Section) -> NDArray[np.void]:
    if section.digits == 4:
        return _translated(fields, _FOUR_DIGITS)
    summed = _translated(fields, _BASE3)
    fifth = _run(values, section.first_value + 4 * section.width, section.width).copy()
    words, last = _words(summed), _words(fifth)
    for row in range(4):
        words[row] += (last >> last.dtype.type(2 * row)) & _repeat(0x03, last)
    return _translated(summed, _CEILING)


def _decode_blocks(kind: int, layout: _Layout, blocks: Bytes, values: Bytes) -> bool:
    """The way back, into `values`; False when a byte stands for no codes."""
    sound = True
    for section in layout.sections:
        raw = np.empty((4, blocks.shape[1]), f"V{section.width}")
        for row in range(4):
            raw[row] = _run(blocks[row], section.first_byte, section.width)
        fields = raw
        if kind == TQ1_0:
            fields = _translated(raw, _FIELDS5 if section.digits == 5 else _FIELDS4)
        words = _words(fields)
        sound = sound and not (words & (words >> words.dtype.type(1)) & _repeat(0x55, words)).any()
        _transpose(fields)
        for n in range(4):
            _run(values, section.first_value + n * section.width, section.width)[:] = fields[n]
        if section.digits == 5:
            last = _words(_translated(raw, _FIFTH))
            for row in range(1, 4):
                last[0] |= last[row] << last.dtype.type(2 * row)
            target = _run(values, section.first_value + 4 * section.width, section.width)
            target[:] = last[0].view(f"V{section.width}")
    return sound


def _transpose(fields: NDArray[np.void]) -> None:
    """Swaps, in place, field i of byte j with field j of byte i; the four bytes are axis 0."""
    words = _words(fields)
    for first, second, shift, mask in (
        (words[:2], words[2:], 4, 0x0F),
        (words[::2], words[1::2], 2, 0x33),
    ):
        distance = words.dtype.type(shift)
        moved = first >> distance
        moved ^= second
        moved &= _repeat(mask, words)
        second ^= moved
        moved <<= distance
        first ^= moved


def _words(array: NDArray[np.void]) -> NDArray[np.unsignedinteger]:
    """The same bytes as the widest words that fit an element."""
    return array.view(np.uint64 if array.dtype.itemsize % 8 == 0 else np.uint32)


def _repeat(byte: int, words: NDArray[np.unsignedinteger]) -> np.unsignedinteger:
    return words.dtype.type(int.from_bytes(bytes([byte]) * words.dtype.itemsize, "little"))


def _run(array: Bytes, first: int, width: int) -> NDArray[np.void]:
    """Bytes first .. first + width of every row as one element, a view."""
    return array[:, first : first + width].view(f"V{width}")[:, 0]


def _translated(array: NDArray[np.void], table: bytes) -> NDArray[np.void]:
    """Replaces every byte by its entry in a table of 256; a new array."""
    return np.frombuffer(bytearray(array).translate(table), array.dtype).reshape(array.shape)


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


def _refuse_illegal_bytes(kind: int, layout: _Layout, blocks: Bytes, first: int) -> None:
    """Names the first byte of blocks (rows, blocks a row, nbytes) that stands for no codes."""
    for section in layout.sections:
        legal = _LEGAL[kind, section.digits]
        end = section.first_byte + section.width
        bad = ~legal[blocks[..., section.first_byte : end]]
        if bad.any():
            row, block, byte = (int(i) for i in np.argwhere(bad)[0])
            byte += section.first_byte
            raise NonTernaryCodeError(
                f"0x{blocks[row, block, byte]:02x}, which stands for no codes, in byte {byte} of "
                f"block {block} of row {first + row}"
            )


def _d(layout: _Layout, blocks: Bytes) -> NDArray[np.uint16]:
    return blocks[..., layout.nbytes - 2 :].view("<u2")[..., 0]


def _zero_blocks(layout: _Layout, blocks: Bytes) -> NDArray[np.bool_]:
    """Which of the blocks (n, nbytes) have no nonzero code."""
    zeros = np.array(layout.zero, np.uint8)
    # Few blocks start with 32 zeros: one word decides nearly all of them.
    found: NDArray[np.bool_] = _run(blocks, 0, 8).copy().view("u8") == zeros[:8].view("u8")[0]
    maybe = np.flatnonzero(found)
    found[maybe] = (blocks[maybe, : len(zeros)] == zeros).all(axis=1)
    return found


def _padded(packed: Bytes, columns: int) -> Bytes:
    if packed.shape[1] == columns:
        return np.ascontiguousarray(packed)
    padded = np.full((packed.shape[0], columns), _ZERO_CODES, np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded


def _row_runs(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_BYTES // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
