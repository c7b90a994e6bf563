"""Independent references: what a BitNet b1.58 pipeline must compute, in float64 and int64.

Written from the published formulas and sharing no code with `forge_harness.quant`, so that an
error in one is not an error in the other. For checks of your own too: every function takes NumPy
arrays, torch tensors or nested lists and returns NumPy arrays. Importing this package costs NumPy,
never torch.
"""

from . import vectors
from .arrays import ArrayLike, float64, int64, whole
from .linear import (
    bias_gradient,
    input_gradient,
    integer_product,
    l1,
    output,
    weight_gradient,
)
from .narrow import Narrowed, narrowed
from .optimizers import AdamW
from .packing import KNOWN_BYTES, KNOWN_CODES, pack_row_blocks, unpack_row_blocks
from .quantizers import EPS, Int8Tokens, Ternary, binary, int8_tokens, ternary, ternary_parts
from .schedules import KINDS, Rates, Schedule, rates_at, schedule
from .tolerances import (
    INT8_MARGIN,
    LINEAR_RTOL_L1,
    ONE_ULP,
    RESCALE_RTOL,
    SCALE_RTOL,
    TERNARY_MARGIN,
    UNIT_ROUNDOFF,
    gradient_limit,
    mean_gradient_limit,
)

__all__ = [
    "EPS",
    "INT8_MARGIN",
    "KINDS",
    "KNOWN_BYTES",
    "KNOWN_CODES",
    "LINEAR_RTOL_L1",
    "ONE_ULP",
    "RESCALE_RTOL",
    "SCALE_RTOL",
    "TERNARY_MARGIN",
    "UNIT_ROUNDOFF",
    "AdamW",
    "ArrayLike",
    "Int8Tokens",
    "Narrowed",
    "Rates",
    "Schedule",
    "Ternary",
    "bias_gradient",
    "binary",
    "float64",
    "gradient_limit",
    "input_gradient",
    "int8_tokens",
    "int64",
    "integer_product",
    "l1",
    "mean_gradient_limit",
    "narrowed",
    "output",
    "pack_row_blocks",
    "rates_at",
    "schedule",
    "ternary",
    "ternary_parts",
    "unpack_row_blocks",
    "vectors",
    "weight_gradient",
    "whole",
]
