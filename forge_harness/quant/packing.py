"""Two bits a ternary code, in the byte order of the Hugging Face packed BitNet checkpoints."""

from __future__ import annotations

from torch import Tensor

from forge_harness import kernels


def pack_i2(codes: Tensor) -> Tensor:
    """Packs ternary codes four a byte, by row blocks; see `forge_harness.kernels.pack_i2`.

    Args:
        codes: int8 (N, K) of -1, 0, +1, on any device.

    Returns:
        uint8 (ceil(N / 4), K) on the same device.

    Raises:
        NonTernaryCodeError: A code is outside -1, 0, +1.
    """
    return kernels.pack_i2(codes)


def unpack_i2(packed: Tensor, rows: int) -> Tensor:
    """Restores the codes of `pack_i2`; see `forge_harness.kernels.unpack_i2`.

    Args:
        packed: uint8 (ceil(rows / 4), K).
        rows: N, which the bytes do not tell.

    Returns:
        int8 (rows, K).

    Raises:
        NonTernaryCodeError: A field holds 3, which stands for no code.
    """
    return kernels.unpack_i2(packed, rows)
