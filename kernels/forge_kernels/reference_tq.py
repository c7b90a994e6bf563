"""Reference of ggml's ternary blocks, TQ2_0 and TQ1_0, four rows at a time, in numpy.

Layouts: ggml's `ggml-quants.c` (`quantize_row_tq1_0_ref`, `quantize_row_tq2_0_ref`). A block holds
256 codes and one fp16 d; value = code * d.

* TQ2_0, 66 bytes: half h of the block is bytes 32h .. 32h + 31; bits 2l and 2l + 1 of byte m hold
  code + 1 of value 128h + 32l + m; then d.
* TQ1_0, 54 bytes: five values a byte as ceil(v * 256 / 243), v = sum of (code + 1) * 3**(4 - n):
  bytes 0 .. 31 hold values 32n + m, bytes 32 .. 47 values 160 + 16n + m, n = 0..4; bytes 48 .. 51
  hold values 240 + 4n + m, n = 0..3, and a fifth digit of 0; then d.

Both ways the work is a transposition: byte (r, c) of the row-block layout holds one column of four
rows, a byte of a block four columns of one row. It is done on words of 8 bytes at a time, with
two exchanges instead of sixteen shifts, and 256-entry tables turn four 2-bit fields into base 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
BLOCK = 256
_ZERO_CODES = 0x55
"""Four fields of code 0."""


@dataclass(frozen=True, slots=True)
class Section:
    """A run of block bytes that share a layout: `digits` runs of `width` values."""

    first_byte: int
    first_value: int
    width: int
    digits: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Bytes of a block.

    Attributes:
        nbytes: In all.
        sections: Runs of its code bytes.
        zero: Code bytes of a block of zeros.
    """

    nbytes: int
    sections: tuple[Section, ...]
    zero: tuple[int, ...]


TQ2 = Layout(66, (Section(0, 0, 32, 4), Section(32, 128, 32, 4)), (0x55,) * 64)
TQ1 = Layout(
    54,
    (Section(0, 0, 32, 5), Section(32, 160, 16, 5), Section(48, 240, 4, 4)),
    (0x80,) * 48 + (0x7F,) * 4,
)


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


def encode_tq(layout: Layout, packed: Bytes, scale: int) -> tuple[Bytes, bool]:
    """Turns row-block codes into four rows of blocks each.

    Args:
        layout: `TQ1` or `TQ2`.
        packed: uint8 (n, K), four rows a byte.
        scale: Bits of the fp16 scale of each block that has a nonzero code.

    Returns:
        uint8 (4, n, ceil(K / 256), bytes of a block), columns beyond K as code 0; and whether no
        field held 3.
    """
    count = -(-packed.shape[1] // BLOCK)
    chunk = _padded(packed, count * BLOCK)
    blocks = _encode_blocks(layout, chunk.reshape(-1, BLOCK))
    nonzero = ~zero_blocks(layout, blocks.reshape(-1, layout.nbytes))
    scales_of(layout, blocks)[...] = np.where(nonzero.reshape(blocks.shape[:2]), scale, 0)
    shape = (4, packed.shape[0], count, layout.nbytes)
    return blocks.reshape(shape), not (packed & (packed >> 1) & 0x55).any()


def decode_tq(layout: Layout, blocks: Bytes, packed: Bytes) -> bool:
    """The way back: uint8 (4, n, K / 256, bytes of a block) into `packed` (n, K).

    Returns:
        Whether every byte stood for codes.
    """
    return _decode_blocks(layout, blocks.reshape(4, -1, layout.nbytes), packed.reshape(-1, BLOCK))


def _encode_blocks(layout: Layout, values: Bytes) -> Bytes:
    """Four rows of blocks (4, n, nbytes) from bytes (n, 256) that hold a column of four rows."""
    blocks = np.empty((4, len(values), layout.nbytes), np.uint8)
    for section in layout.sections:
        fields = np.empty((4, len(values)), f"V{section.width}")
        for n in range(4):
            fields[n] = _run(values, section.first_value + n * section.width, section.width)
        _transpose(fields)
        if layout is TQ1:
            fields = _base3_bytes(fields, values, section)
        for row in range(4):
            _run(blocks[row], section.first_byte, section.width)[:] = fields[row]
    return blocks


def _base3_bytes(fields: NDArray[np.void], values: Bytes, section: Section) -> NDArray[np.void]:
    if section.digits == 4:
        return _translated(fields, _FOUR_DIGITS)
    summed = _translated(fields, _BASE3)
    fifth = _run(values, section.first_value + 4 * section.width, section.width).copy()
    words, last = _words(summed), _words(fifth)
    for row in range(4):
        words[row] += (last >> last.dtype.type(2 * row)) & _repeat(0x03, last)
    return _translated(summed, _CEILING)


def _decode_blocks(layout: Layout, blocks: Bytes, values: Bytes) -> bool:
    """The way back, into `values`; False when a byte stands for no codes."""
    sound = True
    for section in layout.sections:
        raw = np.empty((4, blocks.shape[1]), f"V{section.width}")
        for row in range(4):
            raw[row] = _run(blocks[row], section.first_byte, section.width)
        fields = raw
        if layout is TQ1:
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


def scales_of(layout: Layout, blocks: Bytes) -> NDArray[np.uint16]:
    """Returns the scales of blocks (..., bytes of a block), a view."""
    return blocks[..., layout.nbytes - 2 :].view("<u2")[..., 0]


def zero_blocks(layout: Layout, blocks: Bytes) -> NDArray[np.bool_]:
    """Returns which of the blocks (n, bytes of a block) have no nonzero code."""
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


def legal_bytes(layout: Layout, digits: int) -> NDArray[np.bool_]:
    """Returns which of the 256 bytes stand for codes in a section of that many digits."""
    if layout is TQ2:
        return np.array([3 not in _digits(byte) for byte in range(256)])
    fields = _FIELDS5 if digits == 5 else _FIELDS4
    return np.array([found != 0xFF for found in fields])
