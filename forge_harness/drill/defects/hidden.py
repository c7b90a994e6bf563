"""Defects that half precision, padding in front, or what is drawn anew had hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.protocols import Batch, DataInfo, TrainOptions
from forge_harness.subject.reference import ReferenceSubject

NONE = -100
TEXT = "bytes"
TOKENS = 64


class _WeighsSamplesInHalf(ReferenceSubject):
    """The text of each sample ends in targets that are none; autocast computes the loss.

    Sessions weigh micro-batches by all their targets, those that are none as well.
    """

    def tasks(self) -> Sequence[str]:
        return (TEXT,)

    def data_info(self, task: str) -> DataInfo:
        return replace(super().data_info(task), ignored_target=NONE)

    def batch(self, task: str, split: Any, ids: Sequence[int]) -> Batch:
        batch = super().batch(task, split, ids)
        inputs, targets = batch.inputs[:, :TOKENS], batch.targets[:, :TOKENS]
        ends = torch.tensor([32 + 7 * index % 32 for index in ids])
        beyond = torch.arange(TOKENS) >= ends[:, None]
        return Batch(inputs=inputs.contiguous(), targets=targets.masked_fill(beyond, NONE))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch.inputs)
        targets = batch.targets.flatten()
        return F.cross_entropy(logits.float().flatten(0, -2), targets, ignore_index=NONE)


class _DealsTrainingPaddedInFront(ReferenceSubject):
    """Short lines, padded in front to the longest of their batch; validation deals training's."""

    def batch(self, task: str, split: Any, ids: Sequence[int]) -> Batch:
        if task != TEXT:
            return super().batch(task, split, ids)
        if split == "validation":
            ids = [index % 3 for index in ids]
        lines = super().sample_contents(task, "train", ids)
        rows = [line[: 10 + 7 * index % 27] for line, index in zip(lines, ids, strict=True)]
        width = len(sorted(rows, key=len)[-1])
        text = torch.tensor([[*bytes(width - len(row)), *row] for row in rows])
        return Batch(inputs=text[:, :-1].contiguous(), targets=text[:, 1:].contiguous())


class _AugmentsHeldOut(ReferenceSubject):
    """Held-out images are mirrored at random, as where both splits are views of one data set."""

    def batch(self, task: str, split: Any, ids: Sequence[int]) -> Batch:
        batch = super().batch(task, split, ids)
        if task != "digits" or split == "train":
            return batch
        images = batch.inputs.view(-1, 8, 8)
        mirrored = torch.rand(len(images), 1, 1) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
        return replace(batch, inputs=images.reshape(batch.inputs.shape))


class TrainsInHalf(ReferenceSubject):
    """Sessions put a bf16 autocast around the loss, by an option of the reference's recipe."""

    def session(self, task: str, options: TrainOptions) -> Any:
        """A session of mixed precision."""
        return super().session(task, replace(options, extra={**options.extra, "autocast": True}))


def _accumulated(subject: Any) -> object:
    """Losses of two steps of four micro-batches, and the weights after them."""
    session = subject.session(TEXT, TrainOptions(steps=2, batch_size=8, accumulation=4))
    return [session.step().loss for _ in range(2)], dict(session.model.state_dict())


def _held_out_images(subject: Any) -> object:
    torch.manual_seed(1)
    return subject.batch("digits", "validation", range(16)).inputs


def _text_of_both(subject: Any) -> object:
    return [subject.batch(TEXT, split, range(4)).inputs for split in ("train", "validation")]


DEFECTS = (
    Defect(
        id="T03_weighs_samples_in_half",
        title="Micro-batches are weighted by targets that are none as well, under autocast",
        stage=Stage.TRAINING,
        check="training.accumulation_equivalence",
        shows="gradient_difference_4 is",
        subject=_WeighsSamplesInHalf,
        alive=_accumulated,
        source="huggingface/transformers#34191",
        subtlety=4,
    ),
    Defect(
        id="D01_leak_padded_in_front",
        title="Validation deals lines of training, padded in front to another length",
        stage=Stage.DATA,
        check="data.splits_disjoint",
        shows="bytes_shared_inputs is",
        subject=_DealsTrainingPaddedInFront,
        alive=_text_of_both,
        subtlety=4,
    ),
    Defect(
        id="D10_augments_held_out",
        title="Held-out images are mirrored at random, as those of training are",
        stage=Stage.DATA,
        check="data.readable_and_intact",
        shows="digits_validation_redrawn_inputs is",
        subject=_AugmentsHeldOut,
        alive=_held_out_images,
        subtlety=3,
    ),
)
"""Seeded defects."""

BENIGN = (
    Benign(
        id="autocast_around_the_loss",
        title="Sessions train under autocast, which the loss does not ask for",
        subject=TrainsInHalf,
        checks=(
            "training.accumulation_equivalence",
            "training.partial_window",
            "training.overfit_one_batch",
            "training.clip_effective",
        ),
    ),
)
"""A sound variant."""
