"""Token by token generation, greedy or by seeded sampling, over any model with a cache."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol, SupportsFloat

import torch
from torch import Tensor

from .whole import check_whole


class Generates(Protocol):
    """A language model that remembers the tokens it has seen."""

    def prefill(self, tokens: Tensor) -> Tensor:
        """Maps int64 (1, T) to logits (1, T, V), or (1, 1, V) of the last token alone."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Maps one more token, int64 (1, 1), to logits (1, 1, V)."""
        ...


def generate(
    model: Generates,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: Collection[int] = (),
    device: torch.device | str | None = None,
) -> Iterator[int]:
    """Continues a prompt.

    The prompt follows what the model's cache holds already, so reset it for a new text. Arguments
    are checked here, the model is first called by the first `next`. The last token that is yielded
    has not gone through the model. Sampling draws from a generator of its own, on CPU, so equal
    seeds and logits give equal tokens, and the random state of the process is left alone.

    Args:
        model: Anything with `prefill` and `decode`.
        prompt: Token ids, at least one.
        max_new_tokens: Most tokens to yield.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample among this many likeliest tokens; None, or more than there are: among all.
        seed: Of the sampling.
        stop: Token ids that end the text; they are not yielded.
        device: Where the model wants its tokens.

    Yields:
        Token ids.

    Raises:
        TypeError: A token id of `prompt` or `stop`, or a number that must be one, is no integer; or
            the temperature is no number.
        ValueError: An argument is out of range, or logits are not finite; what the model raises,
            for example when its context is full.
    """
    check_whole(max_new_tokens=max_new_tokens, seed=seed, top_k=1 if top_k is None else top_k)
    _check_numbers(max_new_tokens, temperature, top_k)
    if not (ids := _token_ids("prompt", prompt)):
        raise ValueError("The prompt is empty; expected at least one token id to continue.")
    tokens = torch.tensor([ids], dtype=torch.int64, device=device)
    pick, ends = Picker(temperature, top_k, seed), frozenset(_token_ids("stop", stop))
    return _continue(model, tokens, max_new_tokens, pick, ends)


def _continue(
    model: Generates, tokens: Tensor, most: int, pick: Picker, stop: frozenset[int]
) -> Iterator[int]:
    step = model.prefill
    for _ in range(most):
        token = pick(step(tokens)[0, -1])
        if token in stop:
            return
        yield token
        tokens, step = tokens.new_tensor([[token]]), model.decode


class Picker:
    """Picks the next token from logits (V,), as `generate` does.

    Args:
        temperature: As in `generate`.
        top_k: As in `generate`.
        seed: As in `generate`.
    """

    def __init__(self, temperature: float, top_k: int | None, seed: int) -> None:
        self.temperature, self.top_k = temperature, top_k
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """Returns a token id.

        Raises:
            ValueError: Logits are not finite.
        """
        best, index = logits.max(dim=0)
        # NaN is the maximum of whatever it stands among; -inf elsewhere only forbids a token.
        if not math.isfinite(value := float(best)):
            raise ValueError(
                f"The largest logit is {value}; expected finite logits: look for NaN or infinity "
                "in the weights."
            )
        if not self.temperature:
            return int(index)
        # float64: a small temperature must not overflow, and shifting keeps the likeliest at 0.
        scaled = (logits.double().cpu() - value) / self.temperature
        most = scaled.numel() if self.top_k is None else min(self.top_k, scaled.numel())
        kept, tokens = scaled.topk(most)
        drawn = torch.multinomial(kept.softmax(dim=0), 1, generator=self.generator)
        return int(tokens[drawn])


def _token_ids(name: str, given: Iterable[int]) -> list[int]:
    try:
        tokens = list(given)
    except TypeError:
        raise TypeError(f"{name} {given!r}; expected a sequence of token ids.") from None
    return [_token_id(name, token) for token in tokens]


def _token_id(name: str, token: int) -> int:
    try:
        whole = operator.index(token)
    except TypeError:
        raise TypeError(
            f"{name} holds {token!r}; expected token ids, which are integers."
        ) from None
    if not -(2**63) <= whole < 2**63:
        raise ValueError(
            f"{name} holds {whole}; expected token ids of the model's vocabulary: encode the text "
            "with the model's own tokenizer."
        )
    return whole


def _check_numbers(max_new_tokens: int, temperature: float, top_k: int | None) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens}; expected 0 or more.")
    expected = "expected 0 for the likeliest token, or a positive number."
    if not isinstance(temperature, SupportsFloat):
        raise TypeError(f"temperature {temperature!r}; {expected}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature}; {expected}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k}; expected at least 1, or None for all tokens.")
