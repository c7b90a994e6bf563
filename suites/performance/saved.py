"""What a training step keeps for its backward."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from forge_harness.protocols import Precision, StepRecord, TrainOptions
from forge_harness.subject.arms import FIRST_STEPS, first_steps


class Saved(NamedTuple):
    """Bytes of distinct storages kept for backward in a step, and the steps in front of it."""

    size: int
    first: list[StepRecord]

    def problem(self) -> str:
        """Returns why that is no measurement; empty when it is one."""
        return (
            ""
            if self.size
            else "autograd saved nothing where a session stepped: steps of another thread, process "
            "or library are not seen; let TrainingSession.step compute where it is called"
        )


def saved_by(subject: Any, task: str, precision: Precision, extra: Mapping[str, Any]) -> Saved:
    """Returns what a step of a new session keeps, behind the first ones.

    Args:
        subject: Trains.
        task: Of the subject.
        precision: Of the session.
        extra: Its `TrainOptions.extra`.
    """
    session = subject.session(
        task, TrainOptions(steps=FIRST_STEPS + 1, precision=precision, extra=extra)
    )
    first, earlier = first_steps(session), _contexts()
    seen: dict[int, int] = {}
    begun: list[bool] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def begin(tensor: Tensor) -> Tensor:
        """The first that a backward asks for: now all contexts hold what they keep."""
        if not begun:
            begun.append(True)
            for kept in _tensors_of(each for each in _contexts() if each not in earlier):
                note(kept)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, begin):
        session.step()
    return Saved(sum(seen.values()), first)


def _contexts() -> set[Any]:
    """Those of all autograd functions that wait for their backward."""
    return {
        each
        for each in gc.get_objects()
        if issubclass(type(each), torch.autograd.function.FunctionCtx)
    }


def _tensors_of(contexts: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors in attributes of contexts, which no hook sees."""
    held: list[Any] = [vars(context) for context in contexts]
    while held:
        value = held.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            held += value.values() if isinstance(value, dict) else value
