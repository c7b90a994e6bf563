"""Names and shapes of the tensors of known model families, and how they translate.

One role has one spelling a style: "hf" (transformers' Llama and BitNet classes), "byte-lm"
(`forge_harness.model.ByteLM`) and "gguf" (llama.cpp, `llama-arch.cpp`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from forge_harness.errors import CheckpointError

from .checkpoint import ModelDescription

Style = Literal["hf", "byte-lm", "gguf"]

_STYLES: tuple[Style, ...] = ("hf", "byte-lm", "gguf")
_NAMES: dict[str, tuple[str, str, str]] = {
    "embedding": ("model.embed_tokens", "embedding", "token_embd"),
    "final_norm": ("model.norm", "norm", "output_norm"),
    "head": ("lm_head", "head", "output"),
    "attn_norm": (
        "model.layers.{n}.input_layernorm",
        "blocks.{n}.attention_norm",
        "blk.{n}.attn_norm",
    ),
    "q": ("model.layers.{n}.self_attn.q_proj", "blocks.{n}.attention.q", "blk.{n}.attn_q"),
    "k": ("model.layers.{n}.self_attn.k_proj", "blocks.{n}.attention.k", "blk.{n}.attn_k"),
    "v": ("model.layers.{n}.self_attn.v_proj", "blocks.{n}.attention.v", "blk.{n}.attn_v"),
    "o": ("model.layers.{n}.self_attn.o_proj", "blocks.{n}.attention.o", "blk.{n}.attn_output"),
    "attn_sub_norm": (
        "model.layers.{n}.self_attn.attn_sub_norm",
        "blocks.{n}.attention.o.norm",
        "blk.{n}.attn_sub_norm",
    ),
    "ffn_norm": (
        "model.layers.{n}.post_attention_layernorm",
        "blocks.{n}.ffn_norm",
        "blk.{n}.ffn_norm",
    ),
    "gate": ("model.layers.{n}.mlp.gate_proj", "blocks.{n}.ffn.gate", "blk.{n}.ffn_gate"),
    "up": ("model.layers.{n}.mlp.up_proj", "blocks.{n}.ffn.up", "blk.{n}.ffn_up"),
    "down": ("model.layers.{n}.mlp.down_proj", "blocks.{n}.ffn.down", "blk.{n}.ffn_down"),
    "ffn_sub_norm": (
        "model.layers.{n}.mlp.ffn_sub_norm",
        "blocks.{n}.ffn.down.norm",
        "blk.{n}.ffn_sub_norm",
    ),
}
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""Roles whose weight is ternary in a BitNet model; embedding, head and norms are not."""
FUSED = re.compile(r"blocks\.(\d+)\.attention\.qkv\.weight")
HF_FAMILIES = ("bitnet", "llama")


@dataclass(frozen=True, slots=True)
class Role:
    """What a tensor is in its model: a role of the table above, its layer, and its suffix."""

    kind: str
    layer: int | None
    suffix: str

    def name(self, style: Style) -> str:
        """Spells the tensor's name in a style."""
        template = _NAMES[self.kind][_STYLES.index(style)]
        return f"{template.format(n=self.layer)}.{self.suffix}"


def style_of(family: str) -> Style | None:
    """Returns how a family spells its names, or None for one that is not in the table."""
    return "hf" if family in HF_FAMILIES else "byte-lm" if family == "byte-lm" else None


def role_of(name: str, style: Style) -> Role | None:
    """Returns the role of a tensor name, or None when it has none in this style."""
    module, _, suffix = name.rpartition(".")
    for kind, spellings in _NAMES.items():
        pattern = re.escape(spellings[_STYLES.index(style)]).replace(r"\{n\}", r"(\d+)")
        if match := re.fullmatch(pattern, module):
            layer = int(match.group(1)) if match.groups() else None
            return Role(kind, layer, suffix)
    return None


def renamed(name: str, source: Style, target: Style) -> str | None:
    """Translates a tensor name, or returns None when it has no role in the source style."""
    role = role_of(name, source)
    return None if role is None else role.name(target)


def one_spelling(name: str, family: str, parts: int) -> tuple[str, ...]:
    """Returns the name of each part of a tensor, the same for every family of the table above."""
    style = style_of(family)
    fused = FUSED.fullmatch(name) if style == "byte-lm" and parts == 3 else None
    if fused:
        return tuple(Role(kind, int(fused[1]), "weight").name("hf") for kind in "qkv")
    own = (renamed(name, style, "hf") if style else None) or name
    return (own,) if parts == 1 else tuple(f"{own}[{index}]" for index in range(parts))


def transformers_model(model: ModelDescription) -> ModelDescription:
    """Returns the same model as a transformers configuration.

    A byte LM with sub-norms is a `BitNetForCausalLM`; without them it is a `LlamaForCausalLM` with
    squared ReLU, since the BitNet class always applies sub-norms.

    Raises:
        CheckpointError: The family is not one transformers has.
    """
    if model.family in HF_FAMILIES:
        return model
    if model.family != "byte-lm":
        raise CheckpointError(
            f"Model family {model.family!r} is none that transformers can run; expected one of "
            f"{', '.join((*HF_FAMILIES, 'byte-lm'))}."
        )
    c = model.config
    family = "bitnet" if c["sub_norm"] else "llama"
    return ModelDescription(
        family,
        {
            "architectures": ["BitNetForCausalLM" if c["sub_norm"] else "LlamaForCausalLM"],
            "model_type": family,
            "vocab_size": c["vocabulary"],
            "hidden_size": c["width"],
            "intermediate_size": c["hidden"],
            "num_hidden_layers": c["layers"],
            "num_attention_heads": c["heads"],
            "num_key_value_heads": c["heads"],
            "head_dim": c["width"] // c["heads"],
            "hidden_act": "relu2",
            "max_position_embeddings": c["context"],
            "rms_norm_eps": 1e-5,
            # transformers 4 reads the first spelling, 5 the second; without one theta is 5e5.
            "rope_theta": c["rope_theta"],
            "rope_parameters": {"rope_type": "default", "rope_theta": c["rope_theta"]},
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "dtype": "float32",
        },
    )


def expected_tensors(model: ModelDescription) -> dict[str, tuple[int, ...]] | None:
    """Returns name -> shape of every tensor a Llama or BitNet configuration calls for.

    Tied heads are left out. None for another family.

    Raises:
        CheckpointError: The configuration lacks a size or has one that is no positive count.
    """
    if model.family not in HF_FAMILIES:
        return None
    c = model.config
    width, hidden, layers, heads, vocabulary = (
        _count(c, key)
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        )
    )
    key_value = _count(c, "num_key_value_heads", heads)
    size = _count(c, "head_dim", width // heads)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (vocabulary, width),
        "final_norm": (width,),
        "attn_norm": (width,),
        "q": (heads * size, width),
        "k": (key_value * size, width),
        "v": (key_value * size, width),
        "o": (width, heads * size),
        "ffn_norm": (width,),
        "gate": (hidden, width),
        "up": (hidden, width),
        "down": (width, hidden),
    }
    if model.family == "bitnet":
        shapes |= {"attn_sub_norm": (width,), "ffn_sub_norm": (hidden,)}
    if not c.get("tie_word_embeddings"):
        shapes["head"] = (vocabulary, width)
    return _named(shapes, layers, _biased(c))


def _named(
    shapes: Mapping[str, tuple[int, ...]], layers: int, biased: set[str]
) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    once = ("embedding", "final_norm", "head")
    for kind, shape in shapes.items():
        for layer in (None,) if kind in once else range(layers):
            found[Role(kind, layer, "weight").name("hf")] = shape
            if kind in biased:
                found[Role(kind, layer, "bias").name("hf")] = shape[:1]
    return found


def _biased(config: Mapping[str, Any]) -> set[str]:
    attention = {"q", "k", "v", "o"} if config.get("attention_bias") else set()
    return attention | ({"gate", "up", "down"} if config.get("mlp_bias") else set())


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"config.json has {key} {value!r}; expected a positive count, without which the shapes "
            "of the tensors cannot be checked."
        )
    return value
