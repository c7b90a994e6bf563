"""The byte language model: a decoder-only transformer with ternary projections.

Shape letters: B batch, T tokens, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bitlinear import BitLinear, LinearFunction, Precision
from .describe import DescribesItself
from .norm import RMSNorm
from .token_ids import check_tokens
from .whole import check_finite_number, check_sizes

MAX_PARAMETERS = 2_000_000
"""Budget of the reference language model."""
MAX_CONTEXT = 1 << 20
"""Tables of rotary angles grow with the context, whatever a file says it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteLMConfig:
    """Sizes of `ByteLM`. The defaults are 1,770,752 parameters, 1,703,936 of them ternary."""

    vocabulary: int = 256
    width: int = 256
    layers: int = 2
    heads: int = 4
    hidden: int = 768
    context: int = 128
    """Most tokens of one input."""
    rope_theta: float = 10_000.0
    sub_norm: bool = False
    """An RMSNorm in front of each output and down projection."""
    fused_qkv: bool = False
    """Query, key and value in one weight, with one scale each."""
    residual_init: float = 0.5
    """Multiplies the initial output and down projections: 0.5 up to about 300 steps, 0.1 beyond."""

    def __post_init__(self) -> None:
        sizes = ("vocabulary", "width", "layers", "heads", "hidden", "context")
        check_sizes({"context": MAX_CONTEXT}, **{name: getattr(self, name) for name in sizes})
        check_finite_number(rope_theta=self.rope_theta)
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} with {self.heads} heads; expected a width that is a multiple "
                "of twice the heads: rotary embedding turns pairs within a head."
            )


class ByteLM(DescribesItself):
    """Embedding, `layers` pre-norm blocks of causal attention and gated ReLU^2, norm, tied head.

    Embedding and head share one full-precision weight. Initial weights are N(0, 1 / fan_in), the
    embedding N(0, 1 / width).

    Args:
        config: Sizes.
        linear: Arithmetic of the projections; None: `TernaryLinearOp()`.
        precision: "ternary", or "full" for the full-precision arm with the same parameters.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self,
        config: ByteLMConfig | None = None,
        *,
        linear: LinearFunction | None = None,
        precision: Precision = "ternary",
    ) -> None:
        super().__init__()
        self.config = c = config or ByteLMConfig()
        self.embedding = nn.Embedding(c.vocabulary, c.width)
        nn.init.normal_(self.embedding.weight, std=c.width**-0.5)
        self.blocks = nn.ModuleList(
            _Block(c, linear=linear, precision=precision) for _ in range(c.layers)
        )
        self.norm = RMSNorm(c.width)
        # Built on meta: the tied weight replaces it, and no random number is drawn for it.
        self.head = nn.Linear(c.width, c.vocabulary, bias=False, device="meta")
        self.head.weight = self.embedding.weight
        cos, sin = _rope_tables(c)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps token ids (B, T) int64, T <= context, to next-token logits (B, T, V).

        Raises:
            ValueError: `tokens` are no matrix, or T exceeds the context.
        """
        check_tokens(tokens)
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(
                f"{length} tokens; expected at most the context of {self.config.context}: cut the "
                "input or build the model with a larger context."
            )
        rope = (self.rope_cos[:length], self.rope_sin[:length])
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rope)
        return cast(Tensor, self.head(self.norm(x)))

    def tied(self) -> tuple[tuple[str, str], ...]:
        """The embedding is the head."""
        return (("embedding.weight", "head.weight"),)

    def parameter_formula(self) -> int:
        """D (V + 1) + layers (4 D^2 + 3 D hidden + 2 D [+ D + hidden])."""
        c = self.config
        sub_norms = c.width + c.hidden if c.sub_norm else 0
        per_layer = 4 * c.width**2 + 3 * c.width * c.hidden + 2 * c.width + sub_norms
        return c.width * (c.vocabulary + 1) + c.layers * per_layer


Rope = tuple[Tensor, Tensor]


class _Block(nn.Module):
    def __init__(
        self, config: ByteLMConfig, *, linear: LinearFunction | None, precision: Precision
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = _Attention(config, linear=linear, precision=precision)
        self.ffn_norm = RMSNorm(config.width)
        self.ffn = _FeedForward(config, linear=linear, precision=precision)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        x = x + cast(Tensor, self.attention(self.attention_norm(x), rope))
        return x + cast(Tensor, self.ffn(self.ffn_norm(x)))


class _Attention(nn.Module):
    def __init__(
        self, config: ByteLMConfig, *, linear: LinearFunction | None, precision: Precision
    ) -> None:
        super().__init__()
        self.heads = config.heads
        width = config.width

        def projection(outputs: int, parts: tuple[int, ...] | None = None) -> BitLinear:
            return BitLinear(width, outputs, parts=parts, linear=linear, precision=precision)

        self.qkv = projection(3 * width, (width,) * 3) if config.fused_qkv else None
        if self.qkv is None:
            self.q, self.k, self.v = (projection(width) for _ in range(3))
        self.o = BitLinear(
            width, width, sub_norm=config.sub_norm, linear=linear, precision=precision
        )
        self.o.reset_parameters(config.residual_init)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        batch, length, width = x.shape
        size = width // self.heads
        q, k, v = self._project(x)
        q, k, v = (t.view(batch, length, self.heads, size).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(
            _rotate(q, rope), _rotate(k, rope), v, is_causal=True
        )
        return cast(Tensor, self.o(mixed.transpose(1, 2).reshape(batch, length, width)))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is None:
            return self.q(x), self.k(x), self.v(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return q, k, v


class _FeedForward(nn.Module):
    def __init__(
        self, config: ByteLMConfig, *, linear: LinearFunction | None, precision: Precision
    ) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        self.gate = BitLinear(width, hidden, linear=linear, precision=precision)
        self.up = BitLinear(width, hidden, linear=linear, precision=precision)
        self.down = BitLinear(
            hidden, width, sub_norm=config.sub_norm, linear=linear, precision=precision
        )
        self.down.reset_parameters(config.residual_init)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down(F.relu(self.gate(x)).square() * self.up(x)))


def _rope_tables(config: ByteLMConfig) -> Rope:
    """Returns cos and sin (context, head size / 2), fp32 from float64 angles."""
    half = config.width // config.heads // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(config.context, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turns (B, H, T, size) by position, pairing entry i with i + size / 2 (the NEOX order)."""
    cos, sin = (table.to(x.dtype) for table in rope)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
