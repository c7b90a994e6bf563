"""`CachedDecoder`: decoding with a key-value cache, over whatever linear layers it is given.

Shape letters: B batch, T tokens of a call, P positions so far, D width, H query heads, G key and
value heads, S head size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder_source import BlockSource, DecoderSource, Projection, signed_tables
from .packed_linear import copied_norm

MakeProjection = Callable[[Projection], nn.Module]
"""Makes the module (..., K) -> (..., sum of N) of a projection, norm included."""


class CachedDecoder(nn.Module):
    """A decoder-only transformer for inference that keeps keys and values of earlier tokens.

    The cache is allocated once for a batch size, at its full length, and belongs to no state dict
    and no device move. All sequences of a batch have the same length.

    Args:
        source: The model taken apart; its tensors are copied.
        make: Makes the projections.
        head: Makes the head; the tied one shares the embedding.
        dtype: Of embedding, norms, rotary tables, cache and activations.

    Attributes:
        context: Most tokens.
        position: Tokens in the cache (P).
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self,
        source: DecoderSource,
        make: MakeProjection,
        *,
        head: Callable[[nn.Parameter], nn.Module],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.context, self.position = source.cos.shape[0], 0
        weight = nn.Parameter(source.embedding.detach().to(dtype, copy=True), requires_grad=False)
        rows, width = weight.shape
        self.embedding = nn.Embedding(rows, width, device="meta")  # draws no random number
        self.embedding.weight = weight
        self.blocks = nn.ModuleList(_Block(block, source, make, dtype) for block in source.blocks)
        self.norm = copied_norm(source.norm, dtype)
        self.head = head(weight)
        cos, sin = signed_tables(source, dtype)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._cache_heads, self._head_dim = 2 * source.kv_heads, source.head_dim
        self._cache: Tensor | None = None
        self._layers: tuple[Tensor, ...] = ()
        self.eval()

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, *, last_only: bool = False) -> Tensor:
        """Takes a prompt, or more of one, into the cache.

        Args:
            tokens: int64 (B, T), T >= 1, all B sequences as long as each other.
            last_only: Whether logits of the last token suffice.

        Returns:
            Logits (B, T, V), or (B, 1, V), of the token after each.

        Raises:
            ValueError: There are no tokens, more than the context has room for, or another number
                of sequences than the cache holds. The cache stays as it was.
        """
        return self._run(tokens, last_only)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Takes one more token of each sequence.

        Args:
            tokens: int64 (B, 1).

        Returns:
            Logits (B, 1, V) of the next one.

        Raises:
            ValueError: As `prefill`, or T is not 1.
        """
        if tokens.dim() != 2 or tokens.shape[1] != 1:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; expected (B, 1), one token a sequence: "
                "give more to prefill."
            )
        return self._run(tokens, last_only=False)

    @torch.inference_mode()
    def decode_together(self, others: Sequence[CachedDecoder], tokens: Tensor) -> Tensor:
        """Takes one more token of each of several texts, each in the cache of a fork of its own.

        Where the projections are packed, every text gets the bits that `decode` gives it alone:
        they do not depend on the batch, norms and gates go row by row, and attention and the head,
        whose sums do depend on it, are computed text by text.

        Args:
            others: Forks of this decoder, one sequence in each cache, none twice.
            tokens: int64 (N,), one a fork.

        Returns:
            Logits (N, V).

        Raises:
            ValueError: As `decode`, for one of them, or a fork is there twice or holds nothing. No
                cache is changed.
        """
        if any(other.blocks is not self.blocks for other in others):
            raise ValueError(
                "A decoder has other weights; expected forks of this one: fork one a text."
            )
        _check_together(others, tokens)
        positions = [other.position for other in others]
        at = torch.tensor(positions, device=tokens.device)
        cos, sin = self.rope_cos[at][:, None], self.rope_sin[at][:, None]
        x = self._embedded(tokens[:, None])
        for index, block in enumerate(self.blocks):
            caches = [other._layers[index] for other in others]
            x = cast(_Block, block).forward_together(x, caches, positions, cos, sin)
        for other in others:
            other.position += 1
        rows = self.norm(x).split(1)
        return torch.cat([self.head(row)[:, 0] for row in rows])

    def reset(self) -> None:
        """Forgets all tokens; the next prompt may have another batch size."""
        self.position = 0

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens.

        Raises:
            ValueError: The cache holds fewer.
        """
        if type(length) is not int or not 0 <= length <= self.position:
            raise ValueError(
                f"Cannot keep {length} tokens; expected 0 to the {self.position} in the cache."
            )
        self.position = length

    def fork(self) -> Self:
        """Returns a decoder over the same weights with an empty cache of its own."""
        other = copy.copy(self)
        other.position, other._cache, other._layers = 0, None, ()
        return other

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache: 2 * layers * B * G * context * S values; 0 before the first token."""
        return 0 if self._cache is None else self._cache.nbytes

    def _run(self, tokens: Tensor, last_only: bool) -> Tensor:
        self._check(tokens)
        batch, length = tokens.shape
        start, end = self.position, self.position + length
        mask = None
        if start and length > 1:
            mask = tokens.new_ones((length, end), dtype=torch.bool).tril(start)
        step = _Step(self.rope_cos[start:end], self.rope_sin[start:end], start, end, mask)
        x = self._embedded(tokens)
        for block, cache in zip(self.blocks, self._allocated(batch), strict=True):
            x = block(x, cache, step)
        self.position = end
        return cast(Tensor, self.head(self.norm(x[:, -1:] if last_only else x)))

    def _embedded(self, tokens: Tensor) -> Tensor:
        try:
            return cast(Tensor, self.embedding(tokens))
        except IndexError:
            most = self.embedding.num_embeddings - 1
            wrong = int(tokens[(tokens < 0) | (tokens > most)][0])
            raise ValueError(
                f"Token {wrong} is none of the vocabulary; expected 0 to {most}: encode the text "
                "with the model's own tokenizer."
            ) from None

    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or not tokens.numel():
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; expected (B, T) with at least one token "
                "a sequence: start an empty prompt with a token of your own."
            )
        weight = self.embedding.weight
        if tokens.device != weight.device:
            raise ValueError(
                f"tokens are on {tokens.device}, the model on {weight.device}; move one of them."
            )
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens are {tokens.dtype}; expected token ids in torch.int64 (or torch.int32)."
            )
        if self.position + tokens.shape[1] > self.context:
            raise ValueError(
                f"{tokens.shape[1]} tokens after {self.position}; expected at most the context of "
                f"{self.context} in all: truncate, reset, or build the decoder with more."
            )
        if self.position and tokens.shape[0] != self._layers[0].shape[0]:
            raise ValueError(
                f"{tokens.shape[0]} sequences; expected the {self._layers[0].shape[0]} that the "
                "cache holds: reset before another batch."
            )
        if self.position and not self._cache_fits(tokens.shape[0]):
            cache = self._layers[0]
            raise ValueError(
                f"The cache is {cache.dtype} on {cache.device}, the model {weight.dtype} on "
                f"{weight.device}; expected one of both: reset after moving or converting it."
            )

    def _allocated(self, batch: int) -> tuple[Tensor, ...]:
        """Returns the cache of each layer, (B, 2 G, context, S): keys, then values."""
        if not self._cache_fits(batch):
            self._cache, self._layers = None, ()  # frees the old one first
            weight = self.embedding.weight
            shape = (len(self.blocks), batch, self._cache_heads, self.context, self._head_dim)
            self._cache = weight.new_empty(shape)
            self._layers = self._cache.unbind()
        return self._layers

    def _cache_fits(self, batch: int) -> bool:
        cache, weight = self._cache, self.embedding.weight
        return (
            cache is not None
            and cache.shape[1] == batch
            and cache.dtype == weight.dtype
            and cache.device == weight.device
        )


class _Step(NamedTuple):
    """What all blocks of one call share; `mask` (T, end) only where the cache holds tokens."""

    cos: Tensor
    sin: Tensor
    start: int
    end: int
    mask: Tensor | None


class _Block(nn.Module):
    """h += output(attention(qkv(norm(h)))), then h += down(act(gate) * up)."""

    def __init__(
        self, block: BlockSource, source: DecoderSource, make: MakeProjection, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.attention_norm = copied_norm(block.attention_norm, dtype)
        self.qkv = make(block.qkv)
        self.output = make(block.output)
        self.ffn_norm = copied_norm(block.ffn_norm, dtype)
        self.gate_up = make(block.gate_up)
        self.down = make(block.down)
        self.heads, self.kv_heads = source.heads, source.kv_heads
        self.head_dim, self.squared_relu = source.head_dim, source.squared_relu

    def forward(self, x: Tensor, cache: Tensor, step: _Step) -> Tensor:
        # In place: no gradient is ever wanted, and a decoding step is mostly call overhead.
        mixed = self._attend(self.qkv(self.attention_norm(x)), cache, step)
        return self._forward_mixed(x, mixed)

    def forward_together(
        self,
        x: Tensor,
        caches: Sequence[Tensor],
        positions: Sequence[int],
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Maps (N, 1, D) to (N, 1, D), row n after what cache n holds up to its position."""
        qkv = self.qkv(self.attention_norm(x))
        heads = qkv.view(len(caches), 1, -1, self.head_dim)
        self._turn(heads, cos, sin)
        mixed = [
            self._mix_one(heads[n : n + 1], cache, position)
            for n, (cache, position) in enumerate(zip(caches, positions, strict=True))
        ]
        return self._forward_mixed(x, torch.cat(mixed))

    def _forward_mixed(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x.add_(self.output(mixed))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        gate = gate.relu_().square_() if self.squared_relu else F.silu(gate, inplace=True)
        return x.add_(self.down(gate * up))

    def _attend(self, qkv: Tensor, cache: Tensor, step: _Step) -> Tensor:
        """Maps (B, T, (H + 2 G) S) to (B, T, H S), and puts its keys and values into the cache."""
        batch, length, _ = qkv.shape
        heads = qkv.view(batch, length, -1, self.head_dim)
        self._turn(heads, step.cos, step.sin)
        if length == 1:
            return self._mix_one(heads, cache, step.start)
        new = heads.narrow(2, self.heads, 2 * self.kv_heads)
        cache.narrow(2, step.start, length).copy_(new.transpose(1, 2))
        keys, values = cache.narrow(2, 0, step.end).chunk(2, dim=1)
        queries = heads.narrow(2, 0, self.heads)
        mixed = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys,
            values,
            attn_mask=step.mask,
            is_causal=step.mask is None,
            enable_gqa=self.heads != self.kv_heads,
        )
        return mixed.transpose(1, 2).reshape(batch, length, -1)

    def _turn(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Turns queries and keys of (B, T, H + 2 G, S) by their positions, in place."""
        turned = heads.narrow(2, 0, self.heads + self.kv_heads)
        rolled = turned.roll(self.head_dim // 2, -1)
        torch.add(turned * cos, rolled.mul_(sin), out=turned)

    def _mix_one(self, heads: Tensor, cache: Tensor, start: int) -> Tensor:
        """Maps one token's (B, 1, H + 2 G, S) to (B, 1, H S), and keeps its keys and values."""
        batch = heads.shape[0]
        new = heads.narrow(2, self.heads, 2 * self.kv_heads)
        cache.narrow(2, start, 1).copy_(new.transpose(1, 2))
        kept = cache.narrow(2, 0, start + 1)
        # The queries of a group see the same keys, so they go in as if they were tokens.
        queries = heads.narrow(2, 0, self.heads)
        queries = queries.reshape(batch, self.kv_heads, -1, self.head_dim)
        # torch's processor kernel has no fast bf16 product for a single query: 213 µs, and 76 so
        # (16 heads of 64, 129 tokens, Zen 4, one thread).
        if kept.dtype == torch.bfloat16 and kept.is_cpu and self.heads == self.kv_heads:
            queries, kept = queries.float(), kept.float()
        keys, values = kept.chunk(2, dim=1)
        mixed = F.scaled_dot_product_attention(queries, keys, values).to(heads.dtype)
        return mixed.reshape(batch, 1, -1)


def _check_together(decoders: Sequence[CachedDecoder], tokens: Tensor) -> None:
    if len({id(decoder) for decoder in decoders}) != len(decoders) or not decoders:
        raise ValueError(
            f"{len(decoders)} decoders, not all different; expected at least one, each once: fork "
            "one a text."
        )
    if tokens.shape != (len(decoders),):
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; expected ({len(decoders)},), one a decoder."
        )
    for decoder in decoders:
        if not decoder.position or decoder._layers[0].shape[0] != 1:
            raise ValueError(
                "A decoder holds no text, or more than one; expected one: prefill it alone first."
            )
        decoder._check(tokens[:1, None])
