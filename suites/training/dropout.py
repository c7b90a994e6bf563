"""Comparing two forward passes of a model that draws random numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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
    if not _is_random(loss):
        return nullcontext()
    with WithoutDropout():
        if _is_random(loss):
            pytest.skip("the training loss draws random numbers that are not dropout's")
    return WithoutDropout()


@torch.no_grad()
def _is_random(loss: Callable[[], Tensor]) -> bool:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = loss()
        torch.manual_seed(2)
        return not torch.equal(first, loss())
