"""What another order of sums moves of a trained model's answers: codes of its activations flip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NOISE = 2.0**-22
"""Of each input of a ternary layer: two ulps, as sums of another order differ by. In a decoder of
width 64 that trains on dequantized values (Hugging Face's layers) it flips codes that move a row
of logits by 0.010 to 0.019 of its norm, and the model packed of it differs by 0.007 to 0.015."""
ALLOWED = 2.0
"""How much more than once drawn noise moves: the largest of thousands of rows varies by 1.5."""


@contextmanager
def roundings(model: nn.Module, modules: tuple[str, ...], *, seed: int) -> Iterator[None]:
    """Has each input of these modules moved by noise of the size of roundings.

    Args:
        model: Has the modules.
        modules: Names; one that is not there is left out.
        seed: Of the noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def moved(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_moved(each, generator) for each in given)

    named = dict(model.named_modules())
    hooks = [named[name].register_forward_pre_hook(moved) for name in modules if name in named]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _moved(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    noise = torch.randn(value.shape, generator=generator).to(value)
    return value * (1 + NOISE * noise)
