"""What a decoder needs of a language model: `ByteLM` and `CausalLM` under one set of names.

Shape letters: B batch, T tokens, D width, F hidden, H query heads, G key and value heads, S head
size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .bitlinear import BitLinear
from .byte_lm import ByteLM
from .causal_lm import CausalLM, rope_tables
from .extras import refuse_extras
from .norm import RMSNorm
from .whole import check_whole

LanguageModel = ByteLM | CausalLM


@dataclass(frozen=True, slots=True)
class Projection:
    """Linear layers that read one input, and the norm in front of it, theirs or beside them.

    Attributes:
        layers: Their outputs are joined in this order.
        norm: `RMSNorm` or None.
    """

    layers: tuple[BitLinear, ...]
    norm: RMSNorm | None = None

    @property
    def is_ternary(self) -> bool:
        """Whether all layers have ternary weights."""
        return all(layer.precision == "ternary" for layer in self.layers)


@dataclass(frozen=True, slots=True)
class BlockSource:
    """One block; a norm in front of a projection's quantization belongs to the projection."""

    attention_norm: RMSNorm
    qkv: Projection
    output: Projection
    ffn_norm: RMSNorm
    gate_up: Projection
    down: Projection


@dataclass(frozen=True, slots=True)
class DecoderSource:
    """A language model taken apart; nothing is copied.

    Attributes:
        embedding: (V, D).
        blocks: In order.
        norm: In front of the head.
        head: `BitLinear`, or `nn.Linear` without bias.
        cos: (context, S / 2) fp32.
        sin: As `cos`.
        head_dim: S.
        heads: H.
        kv_heads: G.
        squared_relu: Whether the gate is relu(x)**2, else silu(x).
    """

    embedding: Tensor
    blocks: tuple[BlockSource, ...]
    norm: RMSNorm
    head: BitLinear | nn.Linear
    cos: Tensor
    sin: Tensor
    head_dim: int
    heads: int
    kv_heads: int
    squared_relu: bool

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.head.weight is self.embedding


def read_model(model: LanguageModel, context: int | None) -> DecoderSource:
    """Takes a model apart.

    Args:
        model: `ByteLM` or `CausalLM`.
        context: Most tokens; None: what the model has, which a `CausalLM` does not say.

    Raises:
        TypeError: `model` is another model, or `context` no integer.
        ValueError: `context` is missing, below 1, or more than the model has; or the model or a
            part of it has hooks or a forward of its own.
    """
    if context is not None:
        check_whole(context=context)
        if context < 1:
            raise ValueError(f"context {context}; expected at least 1 token.")
    if isinstance(model, ByteLM):
        _refuse_extras(model, ByteLM)
        return _read_byte_lm(model, context)
    if isinstance(model, CausalLM):
        _refuse_extras(model, CausalLM)
        return _read_causal_lm(model, context)
    raise TypeError(
        f"The model is a {type(model).__name__}; expected ByteLM or CausalLM: use pack_model for "
        "models without a key-value cache."
    )


def _refuse_extras(model: nn.Module, kind: type[nn.Module]) -> None:
    """Raises ValueError for a model that computes more than is read of it."""
    refuse_extras(model, kind)
    for name, module in model.named_modules():
        refuse_extras(module, BitLinear if isinstance(module, BitLinear) else type(module), name)


def _read_byte_lm(model: ByteLM, context: int | None) -> DecoderSource:
    config = model.config
    if context is not None and context > config.context:
        raise ValueError(
            f"context {context}; expected at most the model's own {config.context}: it was trained "
            "on no later position."
        )
    length = context or config.context
    return DecoderSource(
        embedding=model.embedding.weight,
        blocks=tuple(_byte_lm_block(model, n) for n in range(config.layers)),
        norm=model.norm,
        head=model.head,
        cos=model.rope_cos[:length],
        sin=model.rope_sin[:length],
        head_dim=config.width // config.heads,
        heads=config.heads,
        kv_heads=config.heads,
        squared_relu=True,
    )


def _byte_lm_block(model: ByteLM, index: int) -> BlockSource:
    def layers(part: str, *names: str) -> Projection:
        found = [model.get_submodule(f"blocks.{index}.{part}.{name}") for name in names]
        chosen = tuple(cast(BitLinear, layer) for layer in found)
        return Projection(chosen, chosen[0].norm)

    block = model.blocks[index]
    qkv = ("qkv",) if model.config.fused_qkv else ("q", "k", "v")
    return BlockSource(
        attention_norm=cast(RMSNorm, block.attention_norm),
        qkv=layers("attention", *qkv),
        output=layers("attention", "o"),
        ffn_norm=cast(RMSNorm, block.ffn_norm),
        gate_up=layers("ffn", "gate", "up"),
        down=layers("ffn", "down"),
    )


def _read_causal_lm(model: CausalLM, context: int | None) -> DecoderSource:
    if context is None:
        raise ValueError(
            "No context given; expected the most tokens to make room for: a Llama or BitNet "
            "configuration, as it is read here, sets no bound."
        )
    config, decoder = model.config, model.model
    embedding = decoder.embed_tokens.weight
    cos, sin = rope_tables(context, config.head_dim, config.rope_theta, embedding.device)
    return DecoderSource(
        embedding=embedding,
        blocks=tuple(_causal_lm_block(model, n) for n in range(config.num_hidden_layers)),
        norm=decoder.norm,
        head=model.lm_head,
        cos=cos,
        sin=sin,
        head_dim=config.head_dim,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        squared_relu=config.hidden_act == "relu2",
    )


def _causal_lm_block(model: CausalLM, index: int) -> BlockSource:
    def layers(part: str, names: str, norm: object = None) -> Projection:
        prefix = f"model.layers.{index}.{part}"
        found = [model.get_submodule(f"{prefix}.{name}_proj") for name in names.split()]
        return Projection(
            tuple(cast(BitLinear, layer) for layer in found), cast("RMSNorm | None", norm)
        )

    block = model.model.layers[index]
    attention, ffn = cast(nn.Module, block.self_attn), cast(nn.Module, block.mlp)
    return BlockSource(
        attention_norm=cast(RMSNorm, block.input_layernorm),
        qkv=layers("self_attn", "q k v"),
        output=layers("self_attn", "o", attention.attn_sub_norm),
        ffn_norm=cast(RMSNorm, block.post_attention_layernorm),
        gate_up=layers("mlp", "gate up"),
        down=layers("mlp", "down", ffn.ffn_sub_norm),
    )


def signed_tables(source: DecoderSource, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cos and sin (context, 1, S) such that x * cos + roll(x, S / 2) * sin turns x.

    The same products and sums as in the models, so the same bits.
    """
    cos = torch.cat([source.cos, source.cos], dim=-1)
    sin = torch.cat([-source.sin, source.sin], dim=-1)
    return cos[:, None].to(dtype), sin[:, None].to(dtype)
