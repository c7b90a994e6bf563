"""What a training pass computes in: fp32, or less where its model says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forge_harness import oracles

from .support import roundoff

ROUNDINGS = 16
"""Of the usual gradient, on its way through layers in half precision: 0.03 in bf16. A tiny language
model under autocast is off by 9e-4; a mean of unequal means by 0.2."""


class _Coarsest(TorchDispatchMode):
    """Watches for results in less than fp32, within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.roundoff = oracles.UNIT_ROUNDOFF

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Does what is asked, and looks at what it is in."""
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.roundoff = max(self.roundoff, roundoff(value))
        return out


@torch.no_grad()
def coarseness(subject: Any, task: str) -> float:
    """Returns what half precision in a training pass does to a gradient, relative; 0 in fp32."""
    model = subject.build_model(task, seed=0).train()
    batch = subject.example_batch(task, batch_size=2, seed=1)
    with torch.random.fork_rng(devices=[]), _Coarsest() as seen:
        subject.loss(model, batch)
    return ROUNDINGS * (seen.roundoff - oracles.UNIT_ROUNDOFF)
