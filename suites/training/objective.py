"""What a session descends: whether it is the subject's loss, and how far that can fall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from forge_harness import oracles
from forge_harness.subject.protocols import Batch, BuildsModel, LoadsData, TrainOptions

from .dropout import WithoutDropout, is_random, one_loss
from .outputs import changed_tensors
from .precision import Passes
from .states import copied_state
from .support import AsBuilt, Watch, full_precision_steps, gradient_difference, steps

SETTLED = 2
"""Steps before the one whose gradient says what a session descends."""
CERTAINTIES = range(1, 33)
"""Logits of the target over those of the others: at 32 a cross-entropy is next to nothing, and a
smoothed one, whose least value lies at log((1 - e) K / e + 1), has risen again."""


def descends_loss(subject: Any, task: str, options: TrainOptions) -> bool:
    """Whether a session's third gradient is that of the subject's loss; True where none can tell.

    Not what it reports, which may be wrong; and not the first one: fresh models guess, and of a
    guess many objectives say nearly the same. The limit is that of accumulation_equivalence. Of a
    loss that draws other numbers than dropout's (layers skipped at random) none can tell, and of
    targets that are drawn anew with each read neither.
    """
    if not (isinstance(subject, LoadsData) and isinstance(subject, BuildsModel)):
        return True
    with WithoutDropout():
        if is_random(one_loss(subject, task)):
            return True
        session = subject.session(task, replace(options, clip_norm=1e9))
        steps(session, SETTLED)
        built = AsBuilt(subject, task, session)
        state = copied_state(built.trained_model)
        with Watch(built) as watch, Passes(subject, task, session) as passes:
            record = passes.step()
        if passes.problem:
            return True
        unquantized = full_precision_steps(session) > SETTLED
        with passes.in_full_precision(options) if unquantized else nullcontext():
            _, wanted = passes.gradients(state, record.sample_ids)
            coarseness = passes.coarseness(state, record.sample_ids, wanted)
    found = watch.updates[-1].gradients
    limit = oracles.mean_gradient_limit(len(record.sample_ids)) + coarseness
    return gradient_difference(found, wanted) <= limit


def least_loss(subject: Any, task: str, ids: Sequence[int]) -> float:
    """Returns the loss of the best outputs there are for samples of the train split.

    0 where it cannot be known: the subject has no data to ask for, its targets are numbers, its
    outputs are no logits of all classes (one of two, as for a binary cross-entropy), or its loss
    does not see what torch's hooks put in place of an output.
    """
    if not (isinstance(subject, LoadsData) and isinstance(subject, BuildsModel)):
        return 0.0
    info = subject.data_info(task)
    if info.kind == "values":
        return 0.0
    batch = subject.batch(task, "train", list(ids))
    sure = _Sure(batch.targets, info.cardinality)
    losses = [_loss_at(subject, task, batch, partial(sure.put, by=by)) for by in CERTAINTIES]
    if sure.is_square:
        across = (partial(sure.put, by=by, across=True) for by in CERTAINTIES)
        losses += [_loss_at(subject, task, batch, change) for change in across]
    return min(losses) if len(set(losses)) > 1 else 0.0


def objective(subject: Any, task: str) -> float:
    """Returns the loss of fixed outputs for fixed targets: another objective has another.

    Rounded to what every machine agrees in.
    """
    batch = subject.example_batch(task, batch_size=8, seed=1)
    places = torch.arange(batch.targets.numel(), dtype=torch.float64)

    def fixed(output: Tensor) -> Tensor:
        classes = torch.arange(output.shape[-1], dtype=torch.float64)
        values = torch.sin(1.0 + places[:, None] * 3.0 + classes * 7.0)
        return values.to(output.dtype).view(output.shape)

    targets = (places.long() % 2).view(batch.targets.shape)
    return round(_loss_at(subject, task, Batch(inputs=batch.inputs, targets=targets), fixed), 4)


class _Sure:
    """Puts logits that are certain of the targets in place of a model's.

    Attributes:
        is_square: Whether there were as many logits as tokens: which dimension is which does not
            show then.
    """

    def __init__(self, targets: Tensor, classes: int) -> None:
        self._targets, self._classes = targets, classes
        self.is_square = False

    def put(self, output: Tensor, *, by: float, across: bool = False) -> Tensor:
        """Returns them, along the last dimension, or of square outputs along the one before it."""
        if output.shape[-1] < self._classes:
            return output
        is_square = output.dim() > 2 and output.shape[-1] == output.shape[-2]
        self.is_square |= is_square
        logits = torch.zeros_like(output).view(*self._targets.shape, -1)
        # What is no target, a number beyond the classes, counts nowhere.
        places = self._targets.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
        found = logits.scatter(-1, places, by).view(output.shape)
        return found.mT if across and is_square else found


@torch.no_grad()
def _loss_at(subject: Any, task: str, batch: Batch, change: Callable[[Tensor], Tensor]) -> float:
    """The loss in training mode of outputs that are put in place of a fresh model's."""
    model = subject.build_model(task, seed=0).train()
    rows = batch.targets.numel()

    def put(output: Tensor) -> Tensor:
        return change(output) if output.dim() > 1 and output.shape[:-1].numel() == rows else output

    handle = model.register_forward_hook(lambda module, args, out: changed_tensors(out, put)[0])
    with WithoutDropout():
        loss = float(subject.loss(model, batch))
    handle.remove()
    return loss
