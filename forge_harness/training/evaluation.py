"""Held-out quality of a model, counted a sample so that others can form intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.protocols import Batch
from forge_harness.training.data import DataSource
from forge_harness.training.ranks import OneProcess, Ranks

# Larger batches are slower on text: the logits of 32 windows are 4 MB.
_PREDICTIONS_PER_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Quality over samples, in the order of their ids.

    Attributes:
        loss: Mean cross-entropy over all predictions, nats, summed in float64.
        correct: Correct predictions a sample.
        predictions: Predictions a sample.
    """

    loss: float
    correct: tuple[int, ...]
    predictions: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Share of correct predictions."""
        return sum(self.correct) / sum(self.predictions)

    def blocks(self, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sums consecutive samples into `count` blocks of equal size, give or take one sample.

        Returns:
            Correct predictions and predictions a block.
        """
        edges = [index * len(self.correct) // count for index in range(count + 1)]
        spans = [slice(start, end) for start, end in pairwise(edges)]
        correct = tuple(sum(self.correct[span]) for span in spans)
        return correct, tuple(sum(self.predictions[span]) for span in spans)


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    data: DataSource,
    task: str,
    *,
    ids: Sequence[int] | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Evaluates a model on the validation split; its training mode is as before afterwards.

    Args:
        model: Maps inputs to logits (..., classes).
        data: Source of the samples.
        task: Task of the source.
        ids: Validation samples; all when None.
        ranks: Processes the batches are dealt to, which all call this; None: this one. The result
            is the same, to the last bit.
    """
    ranks = ranks or OneProcess()
    chosen = range(data.data_info(task).validation_size) if ids is None else ids
    batches = _batches(data, task, list(chosen))
    mine: list[_Counted] = []
    with _evaluation_mode(model):
        for start in range(0, len(batches), ranks.world_size):
            index = start + ranks.rank
            # One too many is dealt twice: the forwards of a sharded model are made together.
            batch = data.batch(task, "validation", batches[min(index, len(batches) - 1)])
            counted = _count(model, batch, ranks.device)
            mine += [counted] if index < len(batches) else []
    everyone = ranks.exchange(mine)
    counts = [
        everyone[index % ranks.world_size][index // ranks.world_size]
        for index in range(len(batches))
    ]
    predictions = tuple(n for counted in counts for n in counted.predictions)
    return Evaluation(
        sum(counted.loss for counted in counts) / sum(predictions),
        tuple(n for counted in counts for n in counted.correct),
        predictions,
    )


@dataclass(frozen=True, slots=True)
class _Counted:
    """Quality over one batch; the loss is the sum over its predictions."""

    loss: float
    correct: list[int]
    predictions: list[int]


def _count(model: nn.Module, batch: Batch, device: torch.device) -> _Counted:
    logits = model(batch.inputs.to(device)).float()
    targets = batch.targets.to(device)
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    hits = (logits.argmax(dim=-1) == targets).reshape(len(targets), -1)
    return _Counted(
        loss=float(losses.double().sum()),
        correct=_ints(hits.sum(dim=1)),
        predictions=[hits.shape[1]] * hits.shape[0],
    )


def _batches(data: DataSource, task: str, ids: list[int]) -> list[list[int]]:
    if not ids:
        return []
    per_sample = data.batch(task, "validation", ids[:1]).targets.numel()
    size = max(1, _PREDICTIONS_PER_BATCH // per_sample)
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def _ints(tensor: Tensor) -> list[int]:
    return [int(value) for value in tensor]


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # Mode by module: a frozen part that was in evaluation mode must not come back training.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
