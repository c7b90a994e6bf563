"""Comparing two forward passes of a model that draws random numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .support import disturb_generators

REPEATS = 8
"""Of two layers that are skipped four times in ten, all or none are skipped alike in one of 1e4."""


class WithoutDropout(TorchDispatchMode):
    """Keeps every element that dropout would drop at random: a mask of p / p instead of 0 or 1 / p.

    Every dropout of torch on a CPU, and the usual drop-path, fills its mask by `bernoulli_(p)` and
    divides it by p.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Fills a mask with the probability it would be drawn with; does all else as asked."""
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].fill_(args[1] if len(args) > 1 else 0.5)
        return func(*args, **(kwargs or {}))


def comparable(loss: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """Returns a context in which a loss is the same twice; skips the check when there is none.

    Args:
        loss: Computes one loss of one batch, in training mode.
    """
    if not is_random(loss):
        return nullcontext()
    with WithoutDropout():
        if is_random(loss):
            pytest.skip("the training loss draws random numbers that are not dropout's")
    return WithoutDropout()


def one_loss(subject: Any, task: str) -> Callable[[], Tensor]:
    """Returns a function that computes the loss of one batch of a fresh model, always the same."""
    model = subject.build_model(task, seed=0)
    model.train()
    batch = subject.batch(task, "train", list(range(4)))
    return lambda: subject.loss(model, batch)


@torch.no_grad()
def is_random(loss: Callable[[], Tensor]) -> bool:
    """Whether a loss depends on the generators of torch, numpy or Python; they are left alone."""
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        first, *others = (_seeded(loss, seed) for seed in range(1, 2 + REPEATS))
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    return any(not torch.equal(first, other) for other in others)


def _seeded(loss: Callable[[], Tensor], seed: int) -> Tensor:
    disturb_generators(seed)
    return loss()
