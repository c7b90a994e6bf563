"""Which output the loss holds against which target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forge_harness.evidence import smallest
from forge_harness.subject.protocols import Batch, LoadsData

from .outputs import changed_tensors
from .support import counted

FIRST_SAMPLES = 64
"""Training samples among which one is looked for that has no target somewhere."""
_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2))
"""Of the dimensions of outputs: what makes (samples, places, classes) of them."""


@dataclass(slots=True)
class Alignment:
    """What moving single targets did to the loss's gradient.

    Attributes:
        tried: Targets moved.
        elsewhere: Largest change at another output over the change at the target's own.
        where: The target it was, as a flat index.
        unread: Whether none of the targets that were moved changed anything.
    """

    tried: int = 0
    elsewhere: float = 0.0
    where: int = -1
    unread: bool = True


def align(subject: Any, task: str) -> Alignment:
    """Replaces the first, a middle and the last target by another one, outputs held as they are."""
    model = subject.build_model(task, seed=0)
    batch = subject.example_batch(task, batch_size=16, seed=1)
    outputs = _HeldOutputs(batch.targets.shape)
    handle = model.register_forward_hook(outputs.hold)
    before = outputs.gradients(subject.loss(model, batch))
    found = [Alignment() for _ in before]
    known = counted(subject, task, batch.targets).flatten()
    for place in _places(batch.targets.flatten(), known) if before else ():
        targets = _moved(batch.targets, place, known)
        after = outputs.gradients(subject.loss(model, Batch(inputs=batch.inputs, targets=targets)))
        for one, was, now in zip(found, before, after, strict=True):
            _see(one, place, (now - was).norm(dim=-1))
    handle.remove()
    return _least(found)


def _least(found: Sequence[Alignment]) -> Alignment:
    """Returns the best of the ways to read outputs: along the classes no sound loss is aligned."""
    least = smallest(one.elsewhere for one in found)
    return next((one for one in found if one.elsewhere == least), Alignment())


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
    outputs = _HeldOutputs(batch.targets.shape)
    handle = model.register_forward_hook(outputs.hold)
    gradients = outputs.gradients(subject.loss(model, batch))
    handle.remove()
    sizes = [gradient.norm(dim=-1) for gradient in gradients]
    shares = [float(size[~known].max() / size[known].max()) for size in sizes]
    return smallest(shares) if shares else None


def _see(found: Alignment, place: int, change: Tensor) -> None:
    own = float(change[place])
    others = change.clone()
    others[place] = 0.0
    share = float(others.max()) / own if own else math.inf
    found.tried += 1
    found.unread &= not change.any()
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

    def __init__(self, targets: torch.Size) -> None:
        self._targets = targets
        self._leaves: list[Tensor] = []
        self._next = 0

    def hold(self, module: Any, args: Any, out: Any) -> Any:
        self._next = 0
        return changed_tensors(out, self._held)[0]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Returns the gradient at the outputs, a row a target, in each way to read their shape.

        Empty where the loss uses none of them.
        """
        if not self._leaves:
            return []
        found = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        ways = [self._rows(gradient) for gradient in found if gradient is not None]
        count = max(map(len, ways), default=0)
        return [torch.cat([way[i % len(way)] for way in ways], dim=-1) for i in range(count)]

    def _rows(self, value: Tensor) -> list[Tensor]:
        """Returns a value with a row a target, in each way that its shape allows."""
        if value.dim() == 3 and len(self._targets) == 2:
            turned = [value.permute(order) for order in _ORDERS]
            if fits := [one for one in turned if one.shape[:2] == self._targets]:
                return [one.flatten(0, 1) for one in fits]
        if value.dim() < 2 or value.shape[:-1].numel() != self._targets.numel():
            return []
        return [value.flatten(0, -2)]

    def _held(self, value: Tensor) -> Tensor:
        if not self._rows(value):
            return value
        if self._next == len(self._leaves):
            self._leaves.append(value.detach().clone().requires_grad_())
        self._next += 1
        return self._leaves[self._next - 1]
