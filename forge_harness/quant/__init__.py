"""BitNet quantizers, the straight-through estimator, and the arithmetic of ternary layers."""

from .binary import binary_weight
from .integer import int8_matmul, integer_linear
from .linear import COMPUTES, Compute, TernaryLinearOp
from .packing import pack_i2, unpack_i2
from .ste import (
    Quantizer,
    fake_quantize_activation,
    fake_quantize_weight,
    round_ste,
    straight_through,
)
from .ternary import EPS, absmax_int8, absmean_ternary, absmean_ternary_parts, dequantize

__all__ = [
    "COMPUTES",
    "EPS",
    "Compute",
    "Quantizer",
    "TernaryLinearOp",
    "absmax_int8",
    "absmean_ternary",
    "absmean_ternary_parts",
    "binary_weight",
    "dequantize",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "int8_matmul",
    "integer_linear",
    "pack_i2",
    "round_ste",
    "straight_through",
    "unpack_i2",
]
