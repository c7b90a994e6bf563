"""Calls of modules as torch's hooks see them, within the subject's own loss."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from forge_harness.probes.outputs import tensors_of


def observe(subject: Any, model: nn.Module, batch: Any) -> Tensor:
    """Returns the model's output inside the subject's own loss, whatever its call looks like.

    Skips the check where the loss does not call the model, but a method of it: no hook sees that.
    """
    with recording({"model": model}) as calls:
        loss_of(subject, model, batch)
    if not calls["model"]:
        pytest.skip(
            "the subject's loss does not call its model but a method of it, and outputs are seen "
            "where torch's hooks are: compute them in forward, and call model(...) in the loss"
        )
    return calls["model"][-1].output


def loss_of(subject: Any, model: nn.Module, batch: Any, seed: int = 0) -> float:
    """Returns the loss without gradient.

    In training mode generators start anew, and buffers are put back: inputs of one shape get the
    same dropout mask, layers that are skipped at random are the same ones, and so is the state that
    a recurrent layer carries from one batch to the next. In evaluation mode they do not, so that
    what is drawn or carried there shows.
    """
    with _as_it_was(model, seed) if model.training else nullcontext(), torch.no_grad():
        return float(subject.loss(model, batch))


@contextmanager
def _as_it_was(model: nn.Module, seed: int) -> Iterator[None]:
    """Starts the generators anew within the block, and puts back the buffers that it moved."""
    kept = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    with seeded(seed):
        try:
            yield
        finally:
            for module, name, buffer, before in kept:
                if buffer is not None and not torch.equal(buffer, before):
                    buffer.copy_(before)
                module._buffers[name] = buffer


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Starts torch's, numpy's and Python's generators anew within the block."""
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def first_tensor(output: Any) -> Tensor:
    """Returns the tensor a module answers with: itself, or the first of what holds several.

    Scalars come last: a mapping may carry the loss in front of the logits.
    """
    return max(tensors_of(output), key=lambda entry: entry.dim() > 0)


@dataclasses.dataclass(slots=True)
class Call:
    """One call of a module."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor

    @property
    def input(self) -> Tensor:
        """The first tensor it was called with, by place or by name."""
        return first_tensor((*self.arguments, *self.keywords.values()))


@contextmanager
def recording(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Records all calls of the given modules within the block, outputs detached."""
    calls: dict[str, list[Call]] = {name: [] for name in modules}

    def recorder(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            calls[name].append(Call(args, kwargs, first_tensor(out).detach().clone()))

        return hook

    handles = [
        module.register_forward_hook(recorder(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
