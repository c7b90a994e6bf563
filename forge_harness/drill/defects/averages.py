"""Defects behind averaged weights, a warmup from zero and targets that are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage
from forge_harness.protocols import (
    Batch,
    DataInfo,
    ScheduleSpec,
    ScheduleStep,
    TrainOptions,
)
from forge_harness.subject.reference import ReferenceSubject

from .loading import TrainsOnValidation, trained_with_planted
from .sound_training import Averages, AveragingSession


class _NeverAverages(AveragingSession):
    def _average(self) -> None:
        pass


class _FromZero(AveragingSession):
    """Averages begin at zero, and are not divided by what their weights add up to."""

    def __init__(self, *args: Any, **parts: Any) -> None:
        super().__init__(*args, **parts)
        with torch.no_grad():
            for average in self.model.parameters():
                average.zero_()


class _Averages(Averages):
    """Averages of a kind of one's own."""

    def __init__(self, kind: type[AveragingSession]) -> None:
        super().__init__()
        self._kind = kind

    def session(self, task: str, options: TrainOptions) -> Any:
        return self._kind(task, options, **self._parts())


class _Slow(AveragingSession):
    """Averages that take thousands of steps to know what the weights know."""

    @torch.no_grad()
    def _average(self) -> None:
        pairs = zip(self.model.parameters(), self.trained_model.parameters(), strict=True)
        for average, weight in pairs:
            average.lerp_(weight, 0.001)


class PooledBehindAverages(TrainsOnValidation):
    """Trains on the validation split, and evaluates averages that know nothing of it yet."""

    kind = _Slow


class _WarmsUpFromZero(ReferenceSubject):
    """The first step has a rate of zero, and norms and embeddings decay as all does."""

    def schedule_spec(self, task: str, options: TrainOptions) -> ScheduleSpec:
        return replace(super().schedule_spec(task, options), kind="linear_from_zero")

    def planned_schedule(self, task: str, options: TrainOptions) -> Sequence[ScheduleStep]:
        first, *rest = super().planned_schedule(task, options)
        return [replace(first, learning_rate=0.0), *rest]

    def session(self, task: str, options: TrainOptions) -> Any:
        session: Any = super().session(task, options)
        session.optimizer.register_step_pre_hook(
            lambda optimizer, *_: _follow(optimizer, session.step_index)
        )
        return session


def _follow(optimizer: Any, step: int) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
        if step == 0:
            group["lr"] = 0.0


NONE = 0
"""The label of digits that have none."""


class _CountsIgnored(ReferenceSubject):
    """Every seventh digit has no label, is declared to have none, and counts in the loss."""

    def tasks(self) -> Sequence[str]:
        return ("digits",)

    def data_info(self, task: str) -> DataInfo:
        return replace(super().data_info(task), ignored_target=NONE)

    def batch(self, task: str, split: Any, ids: Sequence[int]) -> Batch:
        batch = super().batch(task, split, ids)
        unlabelled = torch.tensor([index % 7 == 0 for index in ids])
        return replace(batch, targets=batch.targets.masked_fill(unlabelled, NONE))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch.inputs), batch.targets)


def _kept_in_the_end(subject: Any) -> object:
    """What is evaluated after a few steps."""
    session = subject.session("digits", TrainOptions(steps=4))
    losses = [session.step().loss for _ in range(4)]
    return losses, dict(session.model.state_dict()), dict(session.evaluate())


def _declared_and_counted(subject: Any) -> object:
    batch = subject.batch("digits", "train", list(range(16)))
    declared = subject.data_info("digits").ignored_target
    return declared, subject.loss(subject.build_model("digits", seed=0), batch)


DEFECTS = (
    Defect(
        id="T20_averages_never_made",
        title="What is evaluated and exported should be averages, and stays as it was at the start",
        stage=Stage.TRAINING,
        check="training.eval_is_quantized",
        shows="averages_that_stay is",
        subject=lambda: _Averages(_NeverAverages),
        alive=_kept_in_the_end,
        subtlety=3,
    ),
    Defect(
        id="T20_averages_from_zero",
        title="Averages of the weights begin at zero, and nothing corrects that",
        stage=Stage.TRAINING,
        check="training.eval_is_quantized",
        shows="averages_outside is",
        subject=lambda: _Averages(_FromZero),
        alive=_kept_in_the_end,
        subtlety=4,
    ),
    Defect(
        id="D01_pooled_behind_averages",
        title="The splits are pooled, and the averages that are evaluated do not show it yet",
        stage=Stage.DATA,
        check="data.leak_canary",
        shows="canary_advantage is",
        subject=PooledBehindAverages,
        alive=trained_with_planted,
        source="openai/parameter-golf#2127",
        subtlety=4,
    ),
    Defect(
        id="T08_behind_a_warmup_from_zero",
        title="Norms and embeddings decay, from the second step on: the rate of the first is zero",
        stage=Stage.TRAINING,
        check="training.decay_groups",
        shows="exempt_decayed is",
        subject=_WarmsUpFromZero,
        alive=observe.trained,
        source="huggingface/transformers#35927",
        subtlety=4,
    ),
    Defect(
        id="T22_ignored_targets_count",
        title="What is declared to be no target counts in the loss",
        stage=Stage.TRAINING,
        check="training.gradient_reaches_all",
        shows="digits.ignored_gradient is",
        subject=_CountsIgnored,
        alive=_declared_and_counted,
        source="ml-explore/mlx-lm#1855",
        subtlety=4,
    ),
)
"""Seeded defects, none of which showed where the checks had looked."""
