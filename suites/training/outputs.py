"""Changing and reading what a model returns, whatever holds its tensors."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from forge_harness.probes.outputs import tensors_of

from .support import counted, trained_model


def changed_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, int]:
    """Returns a copy with all floating tensors changed, and their number."""
    if isinstance(value, Tensor):
        return (change(value), 1) if value.is_floating_point() else (value, 0)
    if isinstance(value, tuple | list):
        found = [changed_tensors(item, change) for item in value]
        items = [item for item, _ in found]
        named = hasattr(value, "_fields")
        return type(value)(*items) if named else type(value)(items), sum(n for _, n in found)
    if isinstance(value, Mapping):
        parts, store = dict(value), operator.setitem
    elif dataclasses.is_dataclass(value):
        parts, store = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, setattr
    else:
        return value, 0
    # A copy of the same type: outputs of transformers are mappings with attributes.
    result, total = copy.copy(value), 0
    for name, part in parts.items():
        item, count = changed_tensors(part, change)
        if count:
            store(result, name, item)
            total += count
    return result, total


def choices(output: Any, cardinality: int) -> Tensor:
    """Returns the largest of each run of `cardinality` logits, from a tensor or what holds one."""
    logits = [entry for entry in tensors_of(output) if entry.dim() > 1]
    if not logits or logits[0].shape[-1] != cardinality:
        return torch.empty(0, dtype=torch.int64)
    return logits[0].argmax(-1).flatten()


@torch.no_grad()
def right_answers(subject: Any, session: Any, task: str, ids: Sequence[int]) -> float:
    """Returns the share of targets of train samples that the trained model answers.

    NaN where its outputs do not say. Leaves it in evaluation mode.
    """
    model = trained_model(session).eval()
    batch = subject.batch(task, "train", list(ids))
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, out: outputs.append(out))
    subject.loss(model, batch)
    handle.remove()
    chosen = [choices(output, subject.data_info(task).cardinality) for output in outputs]
    if sum(map(len, chosen)) != batch.targets.numel():
        return math.nan
    known = counted(subject, task, batch.targets).flatten()
    return float((torch.cat(chosen) == batch.targets.flatten())[known].double().mean())
