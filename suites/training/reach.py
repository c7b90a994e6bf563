"""Which parameters the gradients of a few steps reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from forge_harness.subject.protocols import TrainOptions

from .support import Watch, is_empty, trained_model, zero_factors

MOST_STEPS = 40
"""Steps made at most for parameters that some steps leave out."""


@dataclass(frozen=True, slots=True)
class Reached:
    """What the gradients of a session's first steps reach.

    Attributes:
        steps: Steps made.
        optimizer_steps: Those of the optimizer.
        trainable: Names of all that a gradient should reach.
        dead: Those that it missed in a step that did not leave them out, or in all of them.
        left_out: Those that some step left out.
    """

    steps: int
    optimizer_steps: int
    trainable: list[str]
    dead: list[str]
    left_out: list[str]


@dataclass(frozen=True, slots=True)
class _Step:
    """One step: what its gradients missed, what its forward used, and whether all must wait."""

    missed: set[str]
    used: set[str]
    waits: bool

    def left_out(self, sometimes: set[str]) -> set[str]:
        """Returns what it missed because it left it out, of what is `sometimes` used."""
        return self.missed if self.waits else self.missed & (sometimes - self.used)


def reached(subject: Any, task: str, count: int) -> Reached:
    """Makes `count` steps, and more while they may have left out what no gradient reached.

    A step leaves out the parameters of modules that it does not call, or with no token at all, but
    others do: of layers that are skipped at random, of experts that got none. And what is behind a
    factor of zeros waits until a step has moved that.
    """
    session = subject.session(task, TrainOptions(steps=MOST_STEPS))
    model = trained_model(session)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    steps: list[_Step] = []
    with Watch(session) as watch, _used(model) as used:
        while len(steps) < count or (_may_be_reached(steps) and len(steps) < MOST_STEPS):
            used.clear()
            session.step()
            if len(watch.updates) <= len(steps):
                break
            update = watch.updates[-1]
            missed = {name for name in trainable if not _alive(update.gradients[name])}
            waits = bool(zero_factors({name: update.before[name] for name in trainable}))
            steps.append(_Step(missed, set(used), waits))
    sometimes = _sometimes(steps)
    dead = set().union(_never(steps), *(s.missed - s.left_out(sometimes) for s in steps))
    left_out = set().union(*(s.left_out(sometimes) for s in steps)) - dead
    return Reached(
        session.step_index, len(watch.updates), trainable, sorted(dead), sorted(left_out)
    )


def _sometimes(steps: list[_Step]) -> set[str]:
    return set().union(*(step.used for step in steps))


def _never(steps: list[_Step]) -> set[str]:
    return set.intersection(*(step.missed for step in steps)) if steps else set()


def _may_be_reached(steps: list[_Step]) -> bool:
    """Whether each step left out something that no gradient has reached yet."""
    sometimes = _sometimes(steps)
    return bool(set.intersection(_never(steps), *(s.left_out(sometimes) for s in steps)))


@contextmanager
def _used(model: nn.Module) -> Iterator[set[str]]:
    """Collects the names of parameters whose modules are called within the block."""
    used: set[str] = set()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    handles = [
        module.register_forward_pre_hook(partial(_note, used, names), with_kwargs=True)
        for module in model.modules()
    ]
    try:
        yield used
    finally:
        for handle in handles:
            handle.remove()


def _note(
    used: set[str], names: Mapping[int, str], module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    if not is_empty((*args, *kwargs.values())):
        used.update(names[id(p)] for p in module.parameters(recurse=False) if id(p) in names)


def _alive(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
