"""`BitLinear`, the reference models, transformers' models over it, conversion, packed inference."""

from .bitlinear import BitLinear, LinearFunction, Precision
from .byte_lm import MAX_PARAMETERS, ByteLM, ByteLMConfig
from .causal_lm import CausalLM
from .causal_lm_config import CausalLMConfig
from .convert import ConversionReport, SkippedLinear, convert_linears
from .decoder import CachedDecoder
from .digits import DigitsConfig, DigitsModel
from .generate import generate
from .norm import NORM_EPS, RMSNorm
from .packed_linear import PackedLinear
from .packed_lm import DenseLM, PackedLM
from .packed_model import pack_model, resident_bytes

__all__ = [
    "MAX_PARAMETERS",
    "NORM_EPS",
    "BitLinear",
    "ByteLM",
    "ByteLMConfig",
    "CachedDecoder",
    "CausalLM",
    "CausalLMConfig",
    "ConversionReport",
    "DenseLM",
    "DigitsConfig",
    "DigitsModel",
    "LinearFunction",
    "PackedLM",
    "PackedLinear",
    "Precision",
    "RMSNorm",
    "SkippedLinear",
    "convert_linears",
    "generate",
    "pack_model",
    "resident_bytes",
]
