"""`BitLinear`, the reference models, transformers' models over it, and conversion of others."""

from .bitlinear import BitLinear, LinearFunction, Precision
from .byte_lm import MAX_PARAMETERS, ByteLM, ByteLMConfig
from .causal_lm import CausalLM
from .causal_lm_config import CausalLMConfig
from .convert import ConversionReport, SkippedLinear, convert_linears
from .digits import DigitsConfig, DigitsModel
from .norm import NORM_EPS, RMSNorm

__all__ = [
    "MAX_PARAMETERS",
    "NORM_EPS",
    "BitLinear",
    "ByteLM",
    "ByteLMConfig",
    "CausalLM",
    "CausalLMConfig",
    "ConversionReport",
    "DigitsConfig",
    "DigitsModel",
    "LinearFunction",
    "Precision",
    "RMSNorm",
    "SkippedLinear",
    "convert_linears",
]
