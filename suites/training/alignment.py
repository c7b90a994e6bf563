"""Which output the loss holds against which target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forge_harness.subject.protocols import Batch, LoadsData

from .outputs import changed_tensors
from .support import counted

FIRST_SAMPLES = 64
"""Training samples among which one is looked for that has no target somewhere."""


@dataclass(slots=True)
class Alignment:
    """What moving single targets did to the loss's gradient.

    Attributes:
        tried: Targets moved.
        elsewhere: Largest change at another output over the change at the target's own.
        where: The target it was, as a flat index.
    """

    tried: int = 0
    elsewhere: float = 0.0
    where: int = -1


def align(subject: Any, task: str) -> Alignment:
    """Replaces the first, a middle and the last target by another one, outputs held as they are."""
    model = subject.build_model(task, seed=0)
    batch = subject.example_batch(task, batch_size=16, seed=1)
    outputs = _HeldOutputs(batch.targets.numel())
    handle = model.register_forward_hook(outputs.hold)
    before = outputs.gradient(subject.loss(model, batch))
    found = Alignment()
    if before is not None:
        known = counted(subject, task, batch.targets).flatten()
        for place in _places(batch.targets.flatten(), known):
            targets = _moved(batch.targets, place, known)
            after = outputs.gradient(
                subject.loss(model, Batch(inputs=batch.inputs, targets=targets))
            )
            _see(found, place, (after - before).norm(dim=-1))
    handle.remove()
    return found


def _places(targets: Tensor, known: Tensor) -> list[int]:
    """Returns the first, a middle and the last known target; none where no other one occurs."""
    if len(targets[known].unique()) < 2:
        return []
    places = known.nonzero().flatten().tolist()
    return sorted({places[0], places[(len(places) - 1) // 2], places[-1]})


def ignored_share(subject: Any, task: str) -> float | None:
    """Returns the loss's gradient at what is no target over that at targets, both at their largest.

    None where nothing is declared to be none, no sample among the first has any, or no output has
    the targets' shape.
    """
    if not isinstance(subject, LoadsData) or subject.data_info(task).ignored_target is None:
        return None
    ids = range(min(FIRST_SAMPLES, subject.data_info(task).train_size))
    batch = subject.batch(task, "train", ids)
    known = counted(subject, task, batch.targets).flatten()
    if known.all() or not known.any():
        return None
    model = subject.build_model(task, seed=0)
    outputs = _HeldOutputs(batch.targets.numel())
    handle = model.register_forward_hook(outputs.hold)
    gradient = outputs.gradient(subject.loss(model, batch))
    handle.remove()
    if gradient is None:
        return None
    sizes = gradient.norm(dim=-1)
    return float(sizes[~known].max() / sizes[known].max())


def _see(found: Alignment, place: int, change: Tensor) -> None:
    own = float(change[place])
    others = change.clone()
    others[place] = 0.0
    share = float(others.max()) / own if own else math.inf
    found.tried += 1
    if found.tried == 1 or not share <= found.elsewhere:
        found.elsewhere, found.where = share, place


def _moved(targets: Tensor, place: int, known: Tensor) -> Tensor:
    """The targets with one of them replaced by another known value of the batch."""
    moved = targets.clone()
    flat = moved.view(-1)
    flat[place] = flat[known & (flat != flat[place])][0]
    return moved


class _HeldOutputs:
    """Puts outputs of the first call, those with a row a target, in place of later ones."""

    def __init__(self, targets: int) -> None:
        self._targets = targets
        self._leaves: list[Tensor] = []
        self._next = 0

    def hold(self, module: Any, args: Any, out: Any) -> Any:
        self._next = 0
        return changed_tensors(out, self._held)[0]

    def gradient(self, loss: Tensor) -> Tensor | None:
        """Returns the gradient at the outputs, a row a target; None where the loss uses none."""
        if not self._leaves:
            return None
        found = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        rows = [gradient.flatten(0, -2) for gradient in found if gradient is not None]
        return torch.cat(rows, dim=-1) if rows else None

    def _held(self, value: Tensor) -> Tensor:
        if value.dim() < 2 or value.shape[:-1].numel() != self._targets:
            return value
        if self._next == len(self._leaves):
            self._leaves.append(value.detach().clone().requires_grad_())
        self._next += 1
        return self._leaves[self._next - 1]
