"""The causal language models of transformers' Llama and BitNet classes, over `BitLinear`.

Module names are theirs, so a state dict is theirs too. Read from transformers 5,
`models/llama/modeling_llama.py` and `models/bitnet/modeling_bitnet.py`. Shape letters: B batch,
T tokens, D width, F hidden, H query heads, G key and value heads, S head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.errors import unknown_choice

from .bitlinear import BitLinear, LinearFunction, Precision
from .causal_lm_config import CausalLMConfig
from .describe import DescribesItself
from .norm import RMSNorm
from .token_ids import check_tokens

_SUB_NORMS = ("self_attn.attn_sub_norm", "mlp.ffn_sub_norm")
_PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)

Rope = tuple[Tensor, Tensor]
MakeLinear = Callable[[str, int, int, bool], BitLinear]
"""(module name, input features, output features, bias) -> the layer."""


class CausalLM(DescribesItself):
    """Embedding, pre-norm blocks of grouped-query attention and gated feed-forward, norm, head.

    A block, as in the BitNet class (the Llama class lacks the two sub-norms):
    h += o_proj(attn_sub_norm(attention(q, k, v of input_layernorm(h)))), then
    h += down_proj(ffn_sub_norm(act(gate_proj(z)) * up_proj(z))), z = post_attention_layernorm(h).
    `attention_dropout` is left out: it acts in training only.

    Args:
        config: Sizes and switches.
        ternary: Names of the projections with ternary weights and int8 activations; None: all
            projections of all blocks. An untied "lm_head" may be among them.
        linear: Arithmetic of the ternary projections; None: `TernaryLinearOp()`.

    Raises:
        ValueError: `ternary` names something that is no projection.
    """

    def __init__(
        self,
        config: CausalLMConfig,
        *,
        ternary: Collection[str] | None = None,
        linear: LinearFunction | None = None,
    ) -> None:
        super().__init__()
        self.config = c = config
        names = projection_names(config)
        chosen = set(names if ternary is None else ternary)
        allowed = set(names) | (set() if c.tie_word_embeddings else {"lm_head"})
        for name in sorted(chosen - allowed):
            raise ValueError(unknown_choice("projection", name, allowed))

        def make(name: str, inputs: int, outputs: int, bias: bool) -> BitLinear:
            precision: Precision = "ternary" if name in chosen else "full"
            return BitLinear(inputs, outputs, bias=bias, linear=linear, precision=precision)

        self.model = _Decoder(c, make)
        self.lm_head = make("lm_head", c.hidden_size, c.vocab_size, False)
        if c.tie_word_embeddings:
            self.lm_head.weight = cast(nn.Parameter, self.model.embed_tokens.weight)

    @classmethod
    def from_transformers(
        cls,
        family: str,
        config: Mapping[str, Any],
        *,
        ternary: Collection[str] | None = None,
        linear: LinearFunction | None = None,
    ) -> CausalLM:
        """Builds the model a config.json describes, with fresh weights.

        Raises:
            CheckpointError: The configuration is incomplete or asks for what is not supported.
        """
        read = CausalLMConfig.from_transformers(family, config)
        return cls(read, ternary=ternary, linear=linear)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps token ids (B, T) int64 to next-token logits (B, T, V).

        Raises:
            ValueError: `tokens` are no matrix.
        """
        check_tokens(tokens)
        return cast(Tensor, self.lm_head(self.model(tokens)))

    def sub_norm_names(self) -> tuple[str, ...]:
        """The two norms of each block that BitNet adds; they stand beside the projections."""
        if self.config.family != "bitnet":
            return ()
        layers = range(self.config.num_hidden_layers)
        return tuple(f"model.layers.{n}.{name}" for n in layers for name in _SUB_NORMS)

    def tied(self) -> tuple[tuple[str, str], ...]:
        """Embedding and head, where the configuration ties them."""
        pair = ("model.embed_tokens.weight", "lm_head.weight")
        return (pair,) if self.config.tie_word_embeddings else ()

    def parameter_formula(self) -> int:
        """D (V + 1) [+ D V untied] + layers (2 D S (H + G) + 3 D F + 2 D [+ D + F] [+ biases])."""
        c = self.config
        width, hidden, size = c.hidden_size, c.intermediate_size, c.head_dim
        query, key_value = c.num_attention_heads * size, c.num_key_value_heads * size
        layer = 2 * width * (query + key_value) + 3 * width * hidden + 2 * width
        layer += (width + hidden) * (c.family == "bitnet")
        layer += (query + 2 * key_value + width) * c.attention_bias
        layer += (2 * hidden + width) * c.mlp_bias
        tables = 1 if c.tie_word_embeddings else 2
        return width * (tables * c.vocab_size + 1) + c.num_hidden_layers * layer


def projection_names(config: CausalLMConfig) -> tuple[str, ...]:
    """Returns the names of the seven projections of every block, in module order."""
    layers = range(config.num_hidden_layers)
    return tuple(f"model.layers.{n}.{name}" for n in layers for name in _PROJECTIONS)


class _Decoder(nn.Module):
    def __init__(self, config: CausalLMConfig, make: MakeLinear) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden_size**-0.5)
        self.layers = nn.ModuleList(
            _Block(config, make, f"model.layers.{n}") for n in range(config.num_hidden_layers)
        )
        self.norm = _norm(config, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        rope = rope_tables(tokens.shape[1], self.head_dim, self.rope_theta, x.device)
        for layer in self.layers:
            x = layer(x, rope)
        return cast(Tensor, self.norm(x))


class _Block(nn.Module):
    def __init__(self, config: CausalLMConfig, make: MakeLinear, name: str) -> None:
        super().__init__()
        self.input_layernorm = _norm(config, config.hidden_size)
        self.self_attn = _Attention(config, make, f"{name}.self_attn")
        self.post_attention_layernorm = _norm(config, config.hidden_size)
        self.mlp = _FeedForward(config, make, f"{name}.mlp")

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        x = x + cast(Tensor, self.self_attn(self.input_layernorm(x), rope))
        return x + cast(Tensor, self.mlp(self.post_attention_layernorm(x)))


class _Attention(nn.Module):
    def __init__(self, config: CausalLMConfig, make: MakeLinear, name: str) -> None:
        super().__init__()
        width, size, bias = config.hidden_size, config.head_dim, config.attention_bias
        query, key_value = config.num_attention_heads * size, config.num_key_value_heads * size
        self.head_dim = size
        self.q_proj = make(f"{name}.q_proj", width, query, bias)
        self.k_proj = make(f"{name}.k_proj", width, key_value, bias)
        self.v_proj = make(f"{name}.v_proj", width, key_value, bias)
        self.attn_sub_norm = _sub_norm(config, width)
        self.o_proj = make(f"{name}.o_proj", query, width, bias)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(
            _rotate(q, rope), _rotate(k, rope), v, is_causal=True, enable_gqa=True
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        if self.attn_sub_norm is not None:
            mixed = self.attn_sub_norm(mixed)
        return cast(Tensor, self.o_proj(mixed))


class _FeedForward(nn.Module):
    def __init__(self, config: CausalLMConfig, make: MakeLinear, name: str) -> None:
        super().__init__()
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.squared_relu = config.hidden_act == "relu2"
        self.gate_proj = make(f"{name}.gate_proj", width, hidden, bias)
        self.up_proj = make(f"{name}.up_proj", width, hidden, bias)
        self.ffn_sub_norm = _sub_norm(config, hidden)
        self.down_proj = make(f"{name}.down_proj", hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = F.relu(gate).square() if self.squared_relu else F.silu(gate)
        hidden = gate * self.up_proj(x)
        if self.ffn_sub_norm is not None:
            hidden = self.ffn_sub_norm(hidden)
        return cast(Tensor, self.down_proj(hidden))


def _norm(config: CausalLMConfig, features: int) -> RMSNorm:
    return RMSNorm(features, eps=config.rms_norm_eps)


def _sub_norm(config: CausalLMConfig, features: int) -> RMSNorm | None:
    return _norm(config, features) if config.family == "bitnet" else None


def rope_tables(length: int, size: int, theta: float, device: torch.device) -> Rope:
    """Returns cos and sin (length, S / 2) in fp32.

    Angles are fp32 products of fp32 frequencies, as in transformers: exact ones would differ by
    the rounding of the product, 1e-4 rad near position 4,000.
    """
    exponent = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    position = torch.arange(length, dtype=torch.float32, device=device)
    angle = position[:, None] * (1.0 / theta**exponent)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turns (B, heads, T, S) by position, pairing entry i with i + S / 2 (half-split order)."""
    cos, sin = (table.to(x.dtype) for table in rope)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
