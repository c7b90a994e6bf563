"""Sound training of another kind than the reference's: no check of the training may be red."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.drill.defect import Benign
from forge_harness.drill.defects.evaluation import EvaluatesWith
from forge_harness.drill.defects.sessions import SessionDefect
from forge_harness.protocols import Batch, DataInfo, StepRecord, TrainOptions
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.training import QATSession, training_loss

LIVE = "trained_model."


class AveragingSession(QATSession):
    """Evaluates and exports averages of the weights that it trains (EMA)."""

    def __init__(self, *args: Any, **parts: Any) -> None:
        super().__init__(*args, **parts)
        self.trained_model: nn.Module = self.model
        self.model = copy.deepcopy(self.trained_model)

    @torch.no_grad()
    def _average(self) -> None:
        pairs = zip(self.model.parameters(), self.trained_model.parameters(), strict=True)
        for average, weight in pairs:
            average.lerp_(weight, 0.2)

    def step(self) -> StepRecord:
        """Makes one optimizer step of the trained weights, and moves their averages."""
        record = super().step()
        self._average()
        return record

    def state_tensors(self) -> dict[str, Tensor]:
        """The averages, and the state of what is trained."""
        averages, self.model = self.model, self.trained_model
        try:
            state = super().state_tensors()
        finally:
            self.model = averages
        live = {
            f"{LIVE}{n}": t.detach().clone() for n, t in self.trained_model.state_dict().items()
        }
        return {**state, **live, **{f"model.{n}": t for n, t in averages.state_dict().items()}}


class Averages(ReferenceSubject):
    """Evaluates and exports averaged weights."""

    def session(self, task: str, options: TrainOptions) -> Any:
        """A session that trains one model and averages into another."""
        return AveragingSession(task, options, **self._parts())


class SmoothsLabels(ReferenceSubject):
    """Smooths labels in training mode, and says so in its loss."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy, of smoothed labels in training."""
        return training_loss(model, batch, label_smoothing=0.1 if model.training else 0.0)


class SmoothsInTheSession(ReferenceSubject):
    """Sessions smooth labels by an option of the recipe; the subject's loss does not."""

    def session(self, task: str, options: TrainOptions) -> Any:
        """A session of smoothed labels."""
        extra = {**options.extra, "label_smoothing": 0.1}
        return super().session(task, replace(options, extra=extra))


def _without_momentum(session: Any) -> None:
    groups = [
        {key: group[key] for key in ("params", "decays", "lr", "weight_decay")}
        for group in session.optimizer.param_groups
    ]
    session.optimizer = torch.optim.SGD(groups)


def _by_closure(session: Any) -> None:
    """Has the optimizer's own step compute the gradients, as Lightning's automatic one does."""
    stepping, optimizer = session.step, session.optimizer

    def step() -> StepRecord:
        found: list[StepRecord] = []

        def closure() -> float:
            optimizer.step = lambda: None
            try:
                found.append(stepping())
            finally:
                del optimizer.step
            return found[0].loss

        optimizer.step(closure)
        return found[0]

    session.step = step


def _mode_set_by_each_step(session: Any) -> None:
    """Evaluating leaves the evaluation mode, and each step begins with the training mode."""
    stepping, evaluating = session.step, session.evaluate

    def step() -> Any:
        session.model.train()
        return stepping()

    def evaluate() -> Any:
        result = evaluating()
        session.model.eval()
        return result

    session.step, session.evaluate = step, evaluate


IGNORED = -100


class IgnoresSomeTargets(EvaluatesWith):
    """Every seventh digit has no label, as declared, and counts nowhere."""

    def __init__(self) -> None:
        super().__init__(_quality_of_labelled)

    def tasks(self) -> Sequence[str]:
        """The digits."""
        return ("digits",)

    def data_info(self, task: str) -> DataInfo:
        """The declaration with the value that is no label."""
        return replace(super().data_info(task), ignored_target=IGNORED)

    def batch(self, task: str, split: Any, ids: Sequence[int]) -> Batch:
        """The batch without every seventh label."""
        batch = super().batch(task, split, ids)
        unlabelled = torch.tensor([index % 7 == 0 for index in ids])
        return replace(batch, targets=batch.targets.masked_fill(unlabelled, IGNORED))


def _quality_of_labelled(model: nn.Module, data: Any, task: str) -> dict[str, float]:
    size = data.data_info(task).validation_size
    batch = data.batch(task, "validation", range(size))
    logits, known = model(batch.inputs), batch.targets != IGNORED
    right = (logits.argmax(-1) == batch.targets)[known].double().mean()
    loss = F.cross_entropy(logits, batch.targets, ignore_index=IGNORED)
    return {"loss": float(loss), "accuracy": float(right)}


_LEARNING = ("training.overfit_one_batch", "training.loss_within_band")

_STEPS = (
    "training.parameters_move",
    "training.clip_effective",
    "training.schedule_trace",
    "training.decay_groups",
    "training.non_finite_stops",
    "training.gradient_reaches_all",
    "training.accumulation_equivalence",
)

BENIGN = (
    Benign(
        id="without_momentum",
        title="SGD without momentum: an optimizer that keeps no state",
        subject=lambda: SessionDefect(_without_momentum),
        checks=(
            "training.optimizer_state_exact",
            "training.every_state_saved",
            "training.resume_twice_bit_identical",
        ),
    ),
    Benign(
        id="steps_by_closure",
        title="The optimizer's step is given a closure that computes the gradients (Lightning)",
        subject=lambda: SessionDefect(_by_closure),
        checks=_STEPS,
    ),
    Benign(
        id="mode_set_by_each_step",
        title="Each step sets the training mode, evaluating leaves the other (transformers)",
        subject=lambda: SessionDefect(_mode_set_by_each_step),
        checks=("training.eval_is_quantized",),
    ),
    Benign(
        id="ignored_targets",
        title="Some targets are declared to be none, and count nowhere",
        subject=IgnoresSomeTargets,
        checks=(
            "data.label_or_token_range",
            "training.eval_is_quantized",
            "training.gradient_reaches_all",
            "training.overfit_one_batch",
        ),
    ),
    Benign(
        id="smoothed_labels",
        title="The loss smooths labels in training mode",
        subject=SmoothsLabels,
        checks=(
            *_LEARNING,
            "training.accumulation_equivalence",
            "training.eval_is_quantized",
        ),
    ),
    Benign(
        id="smoothed_in_the_session",
        title="Sessions smooth labels, by an option of the reference's recipe",
        subject=SmoothsInTheSession,
        checks=_LEARNING,
    ),
    Benign(
        id="averaged_weights",
        title="Averages of the trained weights are evaluated and exported",
        subject=Averages,
        checks=(*_STEPS, "training.eval_is_quantized"),
    ),
)
"""Sound variants."""
