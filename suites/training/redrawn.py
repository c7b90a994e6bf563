"""Random numbers of a forward pass that is made again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .rerun import digest


class Draws(TorchDispatchMode):
    """Watches what is drawn within the block: first in the forward pass, then in the backward one.

    A block that is made again (activation checkpointing) must draw what it drew: with another mask
    the gradient is that of a function nobody computed. Only a recomputation has gradients enabled
    in a backward pass, so what hooks and estimators draw there is not counted.

    Attributes:
        forward: Draws of the forward pass.
        again: Draws of recomputations.
        redrawn: Those of them that the forward pass never saw.
        first: The operation that drew the first of those, and its shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.again = self.redrawn = 0
        self.first = "none"
        self._in_backward = False
        self._seen: set[str] = set()

    def backward_begins(self) -> None:
        """What is drawn from now on is drawn again."""
        self._in_backward = True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Does what is asked, and looks at what was drawn."""
        out = func(*args, **(kwargs or {}))
        # Attention has the tag for kernels with a dropout of their own. On a CPU there is none, and
        # a recomputation may take another kernel, which rounds otherwise.
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in str(func):
            for drawn in out if isinstance(out, tuple) else (out,):
                if isinstance(drawn, Tensor) and drawn.numel():
                    self._see(str(func), drawn)
        return out

    def _see(self, name: str, drawn: Tensor) -> None:
        # At once: dropout divides its mask in place.
        found = digest(drawn)
        if not self._in_backward:
            self.forward += 1
            self._seen.add(found)
        elif torch.is_grad_enabled():
            self.again += 1
            if found not in self._seen:
                self.first = self.first if self.redrawn else f"{name} {tuple(drawn.shape)}"
                self.redrawn += 1
