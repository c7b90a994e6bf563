"""Tensor types of GGUF files: ids, names, block sizes (ggml's `ggml.h` and `ggml-common.h`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TQ1_0, TQ2_0, I2_S, TL1, TL2 = 34, 35, 36, 38, 39
"""36, 38 and 39 are bitnet.cpp's: ggml dropped 36 to 38 and gives 39 to MXFP4."""

I2_S_TAIL = 32
"""Bytes behind the codes of an I2_S tensor; the first four are its scale, fp32."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """How a tensor is stored.

    Attributes:
        id: Number in the file.
        name: ggml's name.
        block: Values a block; a row holds whole blocks.
        nbytes: Bytes a block.
        dtype: What torch calls it, for types that store plain numbers.
    """

    id: int
    name: str
    block: int
    nbytes: int
    dtype: torch.dtype | None = None

    def size(self, values: int) -> int:
        """Bytes of a tensor of that many values."""
        tail = I2_S_TAIL if self.id == I2_S else 0
        return values // self.block * self.nbytes + tail


TYPES = {
    t.id: t
    for t in (
        TensorType(0, "F32", 1, 4, torch.float32),
        TensorType(1, "F16", 1, 2, torch.float16),
        TensorType(24, "I8", 1, 1, torch.int8),
        TensorType(25, "I16", 1, 2, torch.int16),
        TensorType(26, "I32", 1, 4, torch.int32),
        TensorType(27, "I64", 1, 8, torch.int64),
        TensorType(28, "F64", 1, 8, torch.float64),
        TensorType(30, "BF16", 1, 2, torch.bfloat16),
        TensorType(TQ1_0, "TQ1_0", 256, 54),
        TensorType(TQ2_0, "TQ2_0", 256, 66),
        TensorType(I2_S, "I2_S", 4, 1),
        TensorType(2, "Q4_0", 32, 18),
        TensorType(3, "Q4_1", 32, 20),
        TensorType(6, "Q5_0", 32, 22),
        TensorType(7, "Q5_1", 32, 24),
        TensorType(8, "Q8_0", 32, 34),
        TensorType(10, "Q2_K", 256, 84),
        TensorType(11, "Q3_K", 256, 110),
        TensorType(12, "Q4_K", 256, 144),
        TensorType(13, "Q5_K", 256, 176),
        TensorType(14, "Q6_K", 256, 210),
        TensorType(16, "IQ2_XXS", 256, 66),
        TensorType(17, "IQ2_XS", 256, 74),
        TensorType(18, "IQ3_XXS", 256, 98),
        TensorType(19, "IQ1_S", 256, 50),
        TensorType(20, "IQ4_NL", 32, 18),
        TensorType(21, "IQ3_S", 256, 110),
        TensorType(22, "IQ2_S", 256, 82),
        TensorType(23, "IQ4_XS", 256, 136),
        TensorType(29, "IQ1_M", 256, 56),
    )
}
TERNARY = frozenset({TQ1_0, TQ2_0, I2_S})
OF_DTYPE = {t.dtype: t for t in TYPES.values() if t.dtype is not None}
