"""`BitLinear`, the two reference models, and the conversion of existing models."""

from .bitlinear import BitLinear, LinearFunction, Precision
from .byte_lm import MAX_PARAMETERS, ByteLM, ByteLMConfig
from .convert import ConversionReport, SkippedLinear, convert_linears
from .digits import DigitsConfig, DigitsModel
from .norm import NORM_EPS, RMSNorm

__all__ = [
    "MAX_PARAMETERS",
    "NORM_EPS",
    "BitLinear",
    "ByteLM",
    "ByteLMConfig",
    "ConversionReport",
    "DigitsConfig",
    "DigitsModel",
    "LinearFunction",
    "Precision",
    "RMSNorm",
    "SkippedLinear",
    "convert_linears",
]
