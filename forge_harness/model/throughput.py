"""Language models made ready to be timed: the packed one and its dense twins, and their calls.

Nothing here reads a clock. All contenders run `CachedDecoder`; they differ in linear layers and
dtype alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from forge_harness.errors import unknown_choice
from forge_harness.kernels import Backend

from .decoder import CachedDecoder
from .decoder_source import LanguageModel
from .packed_lm import DenseLM, PackedLM
from .whole import check_whole

Contender = Literal["dense-bf16", "dense-fp32", "packed", "packed-bf16"]
CONTENDERS: tuple[Contender, ...] = ("dense-bf16", "dense-fp32", "packed", "packed-bf16")
"""What can be compared; "packed" has fp32 activations."""


def contender(
    name: Contender,
    model: LanguageModel,
    *,
    context: int | None = None,
    backend: Backend = "auto",
) -> CachedDecoder:
    """Builds one side of a comparison.

    Args:
        name: One of `CONTENDERS`.
        model: What it is made of; may be dropped afterwards.
        context: Most tokens; a `CausalLM` needs it.
        backend: Of the packed ones; the dense ones are torch's.

    Raises:
        ValueError: `name` is unknown; as `PackedLM` and `DenseLM`.
    """
    if name not in CONTENDERS:
        raise ValueError(unknown_choice("contender", name, CONTENDERS))
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    if name.startswith("dense"):
        return DenseLM(model, context=context, dtype=dtype)
    return PackedLM(model, context=context, dtype=dtype, backend=backend)


def decode_step(model: CachedDecoder, *, fill: int, batch: int = 1) -> Callable[[], Tensor]:
    """Returns a call that decodes one token a sequence behind `fill` tokens, and forgets it.

    The cache is filled here, and is the call's own: other calls on the model do not disturb it.

    Args:
        model: Shared, not changed.
        fill: Tokens in the cache before each call, 0 or more.
        batch: Sequences (B).

    Raises:
        TypeError: `fill` is no integer.
        ValueError: The context has no room for `fill` + 1 tokens.
    """
    check_whole(fill=fill)
    if not 0 <= fill < model.context:
        raise ValueError(
            f"fill {fill}; expected 0 to {model.context - 1}: the context of {model.context} must "
            "have room for the token that is decoded."
        )
    own = model.fork()
    if fill:
        own.prefill(_tokens(own, batch, fill), last_only=True)
    token = _tokens(own, batch, 1)

    def step() -> Tensor:
        own.truncate(fill)
        return own.decode(token)

    step()  # allocates the cache where there was nothing to fill it with
    return step


def prefill(model: CachedDecoder, *, length: int, batch: int = 1) -> Callable[[], Tensor]:
    """Returns a call that takes a prompt into an empty cache and gives its last token's logits.

    Args:
        model: Shared, not changed.
        length: Tokens of the prompt (T), 1 or more.
        batch: Sequences (B).

    Raises:
        TypeError: `length` is no integer.
        ValueError: The context has no room for the prompt.
    """
    check_whole(length=length)
    if not 1 <= length <= model.context:
        raise ValueError(f"length {length}; expected 1 to the context of {model.context}.")
    own = model.fork()
    tokens = _tokens(own, batch, length)

    def call() -> Tensor:
        own.reset()
        return own.prefill(tokens, last_only=True)

    call()
    return call


def _tokens(model: CachedDecoder, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    vocabulary = model.embedding.weight.shape[0]
    tokens = torch.randint(vocabulary, (batch, length), generator=generator)
    return tokens.to(model.embedding.weight.device)
