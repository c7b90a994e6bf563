"""Runs of steps: seeds, samples, ranks and clocks."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.drill import observe
from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.drill.defects.sessions import (
    SessionDefect,
    clock,
    order_of_a_rank,
    reports,
    seeds,
)
from forge_harness.protocols import Batch, DataInfo, TrainOptions
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.training import QATSession

from . import sound_training

REPEAT = "training.repeat_bit_identical"
RANKS = "training.distributed_equivalence"


class _UnseededWeights(ReferenceSubject):
    """One layer draws from a generator that nobody seeds."""

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        model = super().build_model(task, seed=seed)
        with torch.no_grad():
            model.get_parameter("head.weight").add_(np.random.default_rng().random() * 1e-3)
        return model


class _OneSeedForAll(ReferenceSubject):
    def session(self, task: str, options: TrainOptions) -> Any:
        return super().session(task, replace(options, seed=1))


class _HashSeed(ReferenceSubject):
    """The seed is mixed with hash(str): the same within a process, another in the next one."""

    def session(self, task: str, options: TrainOptions) -> Any:
        return super().session(task, _mixed(task, options))

    def resume_session(self, task: str, options: TrainOptions, path: Any) -> Any:
        return super().resume_session(task, _mixed(task, options), path)


def _mixed(task: str, options: TrainOptions) -> TrainOptions:
    return replace(options, seed=(options.seed * 1000003 + hash(f"train:{task}")) % 2**31)


class _ShuffledLabels(ReferenceSubject):
    def batch(self, task: str, split: Any, ids: Sequence[int]) -> Batch:
        batch = super().batch(task, split, ids)
        return Batch(inputs=batch.inputs, targets=torch.randint_like(batch.targets, 10))


class _OtherSamples(ReferenceSubject):
    def session(self, task: str, options: TrainOptions) -> Any:
        return super().session(task, replace(options, fixed_batch=None))


class _WithReplacement(ReferenceSubject):
    """Samples are drawn anew for every batch, some of them twice."""

    def session(self, task: str, options: TrainOptions) -> Any:
        session: Any = super().session(task, options)
        size = self.data_info(task).train_size
        session.position.peek = lambda count: tuple(
            (index * index) % size for index in range(count)
        )
        return session


class _LearnsNothing(ReferenceSubject):
    """The ternary model answers 0 for ever; the loss of its twin starts far above chance.

    The data say they are others, for which there is no golden band.
    """

    def data_info(self, task: str) -> DataInfo:
        return replace(super().data_info(task), digest="sha256:another")

    def session(self, task: str, options: TrainOptions) -> Any:
        session: Any = super().session(task, options)
        head = session.model.get_parameter("head.weight")
        ternary = options.precision == "ternary"
        with torch.no_grad():
            head.mul_(0 if ternary else 60)
        head.requires_grad_(not ternary)
        return session


class _FallsToGuessing(_LearnsNothing):
    """The ternary model forgets an output layer drawn too wide, down to guessing, and no more."""

    def session(self, task: str, options: TrainOptions) -> Any:
        session: Any = super().session(task, options)
        if options.precision == "ternary":
            head = session.model.get_parameter("head.weight")
            with torch.no_grad():
                head.copy_(torch.linspace(-20, 20, head.numel()).view(head.shape))
            session.optimizer.register_step_post_hook(lambda *_: head.data.mul_(0.5))
        return session


class NoAverageOverRanks(ReferenceSubject):
    """Each rank trains on its half of the batch, and nothing is exchanged."""

    def train_distributed(
        self, task: str, options: TrainOptions, *, ranks: int
    ) -> Mapping[str, Tensor]:
        """The weights of one rank."""
        half = replace(options, batch_size=(options.batch_size or 64) // ranks, accumulation=1)
        session: Any = self.session(task, half)
        for _ in range(options.steps):
            session.step()
        weights: Mapping[str, Tensor] = session.model.state_dict()
        return weights


class DropoutInDigits(ReferenceSubject):
    """Dropout of 0.1 in training mode; the small task alone."""

    def tasks(self) -> Sequence[str]:
        """The small task."""
        return ("digits",)

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The reference model with dropout in front of its head."""
        model = super().build_model(task, seed=seed)
        model.get_submodule("head").register_forward_pre_hook(_drop)
        return model


def _drop(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (F.dropout(args[0], 0.1, training=module.training),)


class _NoAverageWithDropout(NoAverageOverRanks, DropoutInDigits):
    """Each rank on its own half of the batch, with dropout."""


class OneSetting(ReferenceSubject):
    """Knows the fast arithmetic only: each that the checks of cost try takes seconds to time."""

    def session(self, task: str, options: TrainOptions) -> Any:
        """A session with the fast arithmetic; other settings are refused."""
        if options.extra:
            raise ValueError("there is one setting")
        if options.precision == "ternary":
            options = replace(options, extra={"compute": "int8"})
        return super().session(task, options)


class _SlowStep(OneSetting):
    """Ternary steps take three times their CPU time."""

    def session(self, task: str, options: TrainOptions) -> Any:
        session = super().session(task, options)
        stepping = session.step

        def step() -> Any:
            start = time.process_time()
            record = stepping()
            end = start + 3 * (time.process_time() - start)
            while time.process_time() < end:
                pass
            return record

        if options.precision == "ternary":
            session.step = step
        return session


class _FullBatches:
    """A data source whose epochs end with their last full batch."""

    def __init__(self, source: Any, options: TrainOptions) -> None:
        self.source, self.size = source, options.batch_size or 64

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def epoch_order(self, task: str, **which: Any) -> Sequence[int]:
        order = list(self.source.epoch_order(task, **which))
        return order[: len(order) // self.size * self.size]

    def data_info(self, task: str) -> Any:
        info = self.source.data_info(task)
        return replace(info, train_size=info.train_size // self.size * self.size)


class _DropsLastBatch(ReferenceSubject):
    """An epoch ends with its last full batch."""

    def session(self, task: str, options: TrainOptions) -> Any:
        data: Any = _FullBatches(self, options)
        return QATSession(task, options, build_model=self._build, load=data)


class _FillsTheBatch(ReferenceSubject):
    """The last batch of an epoch is filled from the next one."""

    def session(self, task: str, options: TrainOptions) -> Any:
        session: Any = super().session(task, options)
        order = [
            index
            for epoch in range(3)
            for index in self.epoch_order(task, seed=options.seed, epoch=epoch)
        ]
        session.position.peek = lambda count: tuple(
            order[session.step_index * count : (session.step_index + 1) * count]
        )
        return session


def _distributed(subject: Any) -> object:
    options = TrainOptions(steps=1, batch_size=22, accumulation=2)
    return dict(subject.train_distributed("digits", options, ranks=2))


class _RanksNeverSetEpoch(ReferenceSubject):
    """Every rank sees the order of epoch 0 for ever; one process alone does not."""

    def epoch_order(self, task: str, *, seed: int, epoch: int, **ranks: Any) -> Sequence[int]:
        epoch = 0 if "RANK" in os.environ else epoch
        return super().epoch_order(task, seed=seed, epoch=epoch, **ranks)


DEFECTS = (
    Defect(
        id="V05_unseeded",
        title="A layer's initial weights come from a generator that nobody seeds",
        stage=Stage.TRAINING,
        check=REPEAT,
        shows="first_different_step is",
        subject=_UnseededWeights,
        alive=seeds,
        subtlety=3,
    ),
    Defect(
        id="V05_seed_ignored",
        title="Every run uses the same seed, whatever it is asked for",
        stage=Stage.TRAINING,
        check=REPEAT,
        shows="tensors_of_another_seed is",
        subject=_OneSeedForAll,
        alive=observe.trained,
        subtlety=2,
    ),
    Defect(
        id="V05_hash_seed",
        title="The seed is mixed with hash(str), which each process salts anew",
        stage=Stage.TRAINING,
        check=REPEAT,
        shows="other_process.sample_ids is",
        subject=_HashSeed,
        alive=observe.trained,
        subtlety=4,
    ),
    Defect(
        id="D05_shuffled_labels",
        title="Labels are drawn anew, independently of their inputs",
        stage=Stage.DATA,
        check="training.overfit_one_batch",
        shows="right_answers is",
        subject=_ShuffledLabels,
        alive=observe.trained,
        subtlety=3,
    ),
    Defect(
        id="other_samples",
        title="The batch that was asked for is ignored, and the epoch's samples are used",
        stage=Stage.TRAINING,
        check="training.overfit_one_batch",
        shows="other_samples is",
        subject=_OtherSamples,
        alive=partial(observe.trained, fixed_batch=tuple(range(16))),
        subtlety=2,
    ),
    Defect(
        id="windows_with_replacement",
        title="Samples are drawn anew for every batch, some of them twice in an epoch",
        stage=Stage.TRAINING,
        check="training.partial_window",
        shows="repeated_samples is",
        subject=_WithReplacement,
        alive=observe.trained,
        subtlety=3,
    ),
    Defect(
        id="T16_loss_too_low",
        title="The training loss reported is half of what it is",
        stage=Stage.TRAINING,
        check="training.loss_within_band",
        shows="loss is",
        subject=lambda: SessionDefect(reports(loss=lambda loss: loss / 2)),
        alive=observe.trained,
        source="pytorch/torchtitan#1758",
        subtlety=2,
    ),
    Defect(
        id="learns_nothing_beside_a_large_start",
        title="The ternary model learns nothing, and the loss of its twin starts far above chance",
        stage=Stage.TRAINING,
        check="training.loss_within_band",
        shows="learned_share is",
        subject=_LearnsNothing,
        alive=observe.trained,
        subtlety=3,
    ),
    Defect(
        id="falls_to_guessing",
        title="The ternary loss falls from an output layer drawn too wide to guessing, and no more",
        stage=Stage.TRAINING,
        check="training.loss_within_band",
        shows="learned_share is",
        subject=_FallsToGuessing,
        alive=observe.trained,
        subtlety=4,
    ),
    Defect(
        id="ranks_not_averaged",
        title="Ranks train on their halves of the batch and exchange no gradients",
        stage=Stage.TRAINING,
        check=RANKS,
        shows="different_tensors is",
        subject=NoAverageOverRanks,
        alive=_distributed,
        subtlety=3,
    ),
    Defect(
        id="ranks_not_averaged_with_dropout",
        title="Ranks exchange no gradients, behind a dropout that makes every run another",
        stage=Stage.TRAINING,
        check=RANKS,
        shows="distance_over_dropout is",
        subject=_NoAverageWithDropout,
        alive=_distributed,
        subtlety=4,
    ),
    Defect(
        id="D03_ranks_never_set_epoch",
        title="Each rank sees the order of the first epoch for ever",
        stage=Stage.DATA,
        check=RANKS,
        shows="different_tensors is",
        subject=_RanksNeverSetEpoch,
        alive=order_of_a_rank,
        source="pytorch/pytorch#31771",
        subtlety=4,
    ),
    Defect(
        id="R11_clock_stopped_early",
        title="The clock of a step stops before its work is done",
        stage=Stage.TRAINING,
        check="training.throughput_recorded",
        shows="reported_share_of_time is",
        subject=lambda: SessionDefect(reports(seconds=lambda seconds: seconds / 10)),
        alive=clock,
        subtlety=3,
    ),
    Defect(
        id="slow_ternary_step",
        title="A ternary step takes three times the CPU time it needs",
        stage=Stage.TRAINING,
        check="performance.training_overhead",
        shows="overhead_ratio is",
        subject=_SlowStep,
        alive=clock,
        subtlety=2,
    ),
)

BENIGN = (
    Benign(
        id="dropout_in_digits",
        title="Dropout in training mode",
        subject=DropoutInDigits,
        checks=(
            "training.accumulation_equivalence",
            "training.partial_window",
            "training.non_finite_stops",
            REPEAT,
            RANKS,
            "training.eval_is_quantized",
        ),
    ),
    Benign(
        id="drops_the_last_batch",
        title="An epoch ends with its last full batch",
        subject=_DropsLastBatch,
        checks=("training.partial_window", "training.accumulation_equivalence"),
    ),
    Benign(
        id="fills_the_last_batch",
        title="The last batch of an epoch is filled from the next one",
        subject=_FillsTheBatch,
        checks=("training.partial_window",),
    ),
    *sound_training.BENIGN,
)
