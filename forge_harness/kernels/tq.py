"""Ternary blocks of GGUF files (see `forge_kernels/reference_tq.py`) from and to row blocks."""

from __future__ import annotations

import numpy as np
from forge_kernels.reference_tq import (
    BLOCK,
    TQ1,
    TQ2,
    Bytes,
    Layout,
    legal_bytes,
    scales_of,
    zero_blocks,
)

from .backends import Backend, native, which

__all__ = [
    "BLOCK",
    "TQ1",
    "TQ2",
    "Layout",
    "decode_tq",
    "encode_tq",
    "legal_bytes",
    "scales_of",
    "zero_blocks",
]

_THREADS = 2
"""Above it writing the blocks takes longer than making them."""


def encode_tq(
    layout: Layout, packed: Bytes, scale: int, *, backend: Backend = "auto"
) -> tuple[Bytes, bool]:
    """Turns row-block codes into four rows of blocks each.

    Args:
        layout: `TQ1` or `TQ2`.
        packed: uint8 (n, K), four rows a byte: bits 2i and 2i + 1 hold code + 1 of row i.
        scale: Bits of the fp16 scale of each block that has a nonzero code.
        backend: Which implementation.

    Returns:
        uint8 (4, n, ceil(K / 256), bytes of a block), columns beyond K as code 0; and whether no
        field held 3. With one, blocks of the row it belongs to mean nothing.

    Raises:
        BackendUnavailableError: The explicit backend is not there.
    """
    if which("encode_tq", backend) == "reference":
        from forge_kernels import reference_tq

        return reference_tq.encode_tq(layout, packed, scale)
    rows, columns = packed.shape
    blocks = np.empty((4, rows, -(-columns // BLOCK), layout.nbytes), np.uint8)
    sound = native().encode_tq(layout is TQ1, np.ascontiguousarray(packed), scale, blocks, _THREADS)
    return blocks, bool(sound)


def decode_tq(layout: Layout, blocks: Bytes, packed: Bytes, *, backend: Backend = "auto") -> bool:
    """Turns four rows of blocks into row-block codes.

    Args:
        layout: `TQ1` or `TQ2`.
        blocks: uint8 (4, n, K / 256, bytes of a block); scales are not looked at.
        packed: uint8 (n, K), contiguous; is written.
        backend: Which implementation.

    Returns:
        Whether every byte stood for codes; where not, what was written means nothing.

    Raises:
        BackendUnavailableError: The explicit backend is not there.
    """
    if which("decode_tq", backend) == "reference":
        from forge_kernels import reference_tq

        return reference_tq.decode_tq(layout, blocks, packed)
    return bool(native().decode_tq(layout is TQ1, np.ascontiguousarray(blocks), packed, _THREADS))
