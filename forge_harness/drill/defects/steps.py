"""Gradients of a step: summed over micro-batches, scaled and clipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage
from forge_harness.drill.defects.sessions import (
    SessionDefect,
    as_kind,
    before_each_step,
    of_text,
    reports,
    text_trained,
)
from forge_harness.training import QATSession
from forge_harness.training.optimize import clip_gradients, gradient_norm

ACCUMULATION = "training.accumulation_equivalence"
CLIPPING = "training.clip_effective"

uneven = partial(observe.trained, batch_size=22, accumulation=4)
"""Micro-batches of unequal size."""
short_windows = partial(observe.trained, batch_size=1430, accumulation=4)
"""Every second window holds fewer samples than there are micro-batches."""


class Accumulates(QATSession):
    """Sessions that sum over micro-batches in a loop of their own: right, to be made wrong."""

    def weights(self, sizes: Sequence[int], count: int) -> list[float]:
        """Returns the share of each micro-batch, `count` being how many a full window has."""
        return [size / sum(sizes) for size in sizes]

    def _accumulate(self, micro_batches: Sequence[tuple[int, ...]]) -> float:
        batches = [self.data.batch(self.task, "train", ids) for ids in micro_batches if ids]
        sizes = [batch.targets.numel() for batch in batches]
        weights = self.weights(sizes, len(micro_batches))
        total = 0.0
        for batch, weight in zip(batches, weights, strict=True):
            loss = self._loss(self.model, batch)
            self._backward(loss * weight)
            total += float(loss.detach()) * weight
        return total

    def _backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]


class _Undivided(Accumulates):
    def weights(self, sizes: Sequence[int], count: int) -> list[float]:
        return [1.0] * len(sizes)


class _MeanOfMeans(Accumulates):
    def weights(self, sizes: Sequence[int], count: int) -> list[float]:
        return [1 / len(sizes)] * len(sizes)


class _NominalCount(Accumulates):
    """Divides by the micro-batches a full window has."""

    def weights(self, sizes: Sequence[int], count: int) -> list[float]:
        if len(sizes) < count:
            return [1 / count] * len(sizes)
        return super().weights(sizes, count)


class _ClearsEachMicroBatch(Accumulates):
    def _backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        super()._backward(loss)


class _AccumulatesInBf16(Accumulates):
    def _backward(self, loss: Tensor) -> None:
        super()._backward(loss)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.bfloat16().float()


class _MovingAverage(Accumulates):
    def _backward(self, loss: Tensor) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
        super()._backward(loss)


class _ClipsEachMicroBatch(Accumulates):
    """`clip_grad_norm_` in the loop over micro-batches; right for one."""

    def _backward(self, loss: Tensor) -> None:
        super()._backward(loss)
        norm = gradient_norm(self._parameters)
        if self.recipe.clip_norm and norm:
            clip_gradients(self._parameters, norm, self.recipe.clip_norm)


def _keeps_gradients(session: Any) -> None:
    session.optimizer.zero_grad = lambda set_to_none=True: None


def _never_clips(session: Any) -> None:
    session.recipe = replace(session.recipe, clip_norm=math.inf)


def _clips_each_parameter(session: Any) -> None:
    limit = session.recipe.clip_norm / math.sqrt(len(list(session.model.parameters())))
    _never_clips(session)

    def clip(session: Any) -> None:
        for parameter in session.model.parameters():
            nn.utils.clip_grad_norm_([parameter], limit)

    before_each_step(clip)(session)


def _scales_gradients(session: Any) -> None:
    for parameter in session.model.parameters():
        parameter.grad.mul_(1e-3)


def _halves_every_other_step(session: Any) -> None:
    # A loss scaler that doubles its scale before the gradients are divided by it.
    if session.step_index % 2:
        for parameter in session.model.parameters():
            parameter.grad.mul_(0.5)


DEFECTS = (
    Defect(
        id="T01_undivided",
        title="The sum over micro-batches is not divided by their number",
        stage=Stage.TRAINING,
        check=ACCUMULATION,
        shows="gradient_difference_4 is",
        subject=lambda: SessionDefect(as_kind(_Undivided)),
        alive=uneven,
        source="huggingface/transformers#34191",
        subtlety=2,
    ),
    Defect(
        id="T01_undivided_for_text",
        title="In the text task alone the sum over micro-batches is not divided by their number",
        stage=Stage.TRAINING,
        check=ACCUMULATION,
        shows="bytes.gradient_difference is",
        subject=lambda: SessionDefect(of_text(as_kind(_Undivided))),
        alive=partial(text_trained, accumulation=4),
        source="huggingface/transformers#34191",
        subtlety=4,
    ),
    Defect(
        id="T01_mean_of_means",
        title="Micro-batches of unequal size count alike",
        stage=Stage.TRAINING,
        check=ACCUMULATION,
        shows="gradient_difference_4 is",
        subject=lambda: SessionDefect(as_kind(_MeanOfMeans)),
        alive=uneven,
        source="huggingface/transformers#34191",
        subtlety=3,
    ),
    Defect(
        id="T01_nominal_count",
        title="The last window of an epoch is divided by the micro-batches a full one has",
        stage=Stage.TRAINING,
        check="training.partial_window",
        shows="gradient_difference",
        subject=lambda: SessionDefect(as_kind(_NominalCount)),
        alive=short_windows,
        source="huggingface/transformers#37766",
        subtlety=4,
    ),
    Defect(
        id="T07_zero_grad_in_the_loop",
        title="zero_grad inside the loop over micro-batches: only the last one counts",
        stage=Stage.TRAINING,
        check=ACCUMULATION,
        shows="gradient_difference_4 is",
        subject=lambda: SessionDefect(as_kind(_ClearsEachMicroBatch)),
        alive=uneven,
        source="huggingface/accelerate#641",
        subtlety=2,
    ),
    Defect(
        id="T07_never_cleared",
        title="Gradients are never cleared between steps",
        stage=Stage.TRAINING,
        check=ACCUMULATION,
        shows="gradient_difference_1 is",
        subject=lambda: SessionDefect(_keeps_gradients),
        alive=observe.trained,
        source="huggingface/accelerate#641",
        subtlety=2,
    ),
    Defect(
        id="T18_moving_average",
        title="The running gradient is divided at each micro-batch: a moving average",
        stage=Stage.TRAINING,
        check=ACCUMULATION,
        shows="gradient_difference_4 is",
        subject=lambda: SessionDefect(as_kind(_MovingAverage)),
        alive=uneven,
        source="pytorch/torchtitan#1732",
        subtlety=3,
    ),
    Defect(
        id="G11_bf16_buffers",
        title="Gradients are accumulated in bf16 buffers",
        stage=Stage.TRAINING,
        check=ACCUMULATION,
        shows="gradient_difference",
        subject=lambda: SessionDefect(as_kind(_AccumulatesInBf16)),
        alive=uneven,
        source="linkedin/Liger-Kernel#1329",
        subtlety=4,
    ),
    Defect(
        id="T03_loss_scaled",
        title="The reported loss is divided by one target too many",
        stage=Stage.TRAINING,
        check=ACCUMULATION,
        shows="loss_difference_1 is",
        subject=lambda: SessionDefect(reports(loss=lambda loss: loss * 21 / 22)),
        alive=observe.trained,
        source="huggingface/transformers#46204",
        subtlety=4,
    ),
    Defect(
        id="T03_loss_not_a_number",
        title="The reported loss is not a number, and training goes on",
        stage=Stage.TRAINING,
        check=ACCUMULATION,
        shows="loss_difference_1 is nan",
        subject=lambda: SessionDefect(reports(loss=lambda loss: math.nan)),
        alive=observe.trained,
        subtlety=2,
    ),
    Defect(
        id="T05_clips_each_micro_batch",
        title="Each micro-batch is clipped, not their sum",
        stage=Stage.TRAINING,
        check=ACCUMULATION,
        shows="clipped_difference is",
        subject=lambda: SessionDefect(as_kind(_ClipsEachMicroBatch)),
        alive=uneven,
        subtlety=4,
    ),
    Defect(
        id="T17_scale_grows_before_unscaling",
        title="The loss scale doubles before gradients are divided by it: every second one is half",
        stage=Stage.TRAINING,
        check=ACCUMULATION,
        shows="gradient_difference_1 is",
        subject=lambda: SessionDefect(before_each_step(_halves_every_other_step)),
        alive=observe.trained,
        source="deepspeedai/DeepSpeed#8588",
        subtlety=5,
    ),
    Defect(
        id="T04_never_clipped",
        title="Clipping has no effect: gradients reach the optimizer as they are",
        stage=Stage.TRAINING,
        check=CLIPPING,
        shows="norm_at_optimizer is",
        subject=lambda: SessionDefect(_never_clips),
        alive=observe.trained,
        source="awslabs/graphstorm#1366",
        subtlety=3,
    ),
    Defect(
        id="T04_text_never_clipped",
        title="Gradients of the text task alone reach the optimizer as they are",
        stage=Stage.TRAINING,
        check=CLIPPING,
        shows="bytes.norm_at_optimizer is",
        subject=lambda: SessionDefect(of_text(_never_clips)),
        alive=partial(text_trained, clip_norm=0.1),
        source="awslabs/graphstorm#1366",
        subtlety=4,
    ),
    Defect(
        id="T19_clips_by_parameter",
        title="Each parameter is clipped by its own norm",
        stage=Stage.TRAINING,
        check=CLIPPING,
        shows="norm_kept is",
        subject=lambda: SessionDefect(_clips_each_parameter),
        alive=observe.trained,
        source="pytorch/pytorch#88621",
        subtlety=4,
    ),
    Defect(
        id="T05_clips_scaled",
        title="Gradients are clipped while the loss scale is on them, and unscaled afterwards",
        stage=Stage.TRAINING,
        check=CLIPPING,
        shows="norm_kept is",
        subject=lambda: SessionDefect(before_each_step(_scales_gradients)),
        alive=observe.trained,
        source="Lightning-AI/pytorch-lightning#9599",
        subtlety=3,
    ),
    Defect(
        id="T19_norm_of_one_shard",
        title="The reported gradient norm is that of one shard",
        stage=Stage.TRAINING,
        check=CLIPPING,
        shows="reported_norm_error is",
        subject=lambda: SessionDefect(reports(grad_norm=lambda norm: norm / 2)),
        alive=observe.trained,
        source="pytorch/torchtitan#649",
        subtlety=4,
    ),
)
