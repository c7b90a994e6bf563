"""What the seeded defects of models share: a model changed after it is built."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from forge_harness.model import BitLinear
from forge_harness.subject.reference import ReferenceSubject


class ModelDefect(ReferenceSubject):
    """The reference models, changed in place after they are built.

    Args:
        change: What is done to a model.
        task: The task whose model it is done to; None: every task.
    """

    def __init__(self, change: Callable[[Any], None], task: str | None = None) -> None:
        self.change = change
        self.task = task

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The reference model, changed."""
        model = super().build_model(task, seed=seed)
        if self.task in (None, task):
            self.change(model)
        return model


def ternary_layers(model: nn.Module) -> list[Any]:
    """Returns the `BitLinear`s of a model. Any: their methods are replaced."""
    return [module for module in model.modules() if isinstance(module, BitLinear)]


def normed_layers(model: nn.Module) -> list[Any]:
    """Returns the layers that hold a norm."""
    return [layer for layer in ternary_layers(model) if layer.norm is not None]


def replace_forward(module: Any, forward: Callable[..., Any]) -> None:
    """Makes `forward(module, *arguments)` the forward of one module.

    A bound method, not a closure over the module: a copy of the module computes with itself.
    """
    module.forward = MethodType(forward, module)
