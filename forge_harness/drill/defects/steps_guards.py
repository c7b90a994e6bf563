"""Steps whose loss or gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.drill.defects.sessions import (
    SessionDefect,
    after_infinity,
    as_kind,
    copies,
    largest,
    of_text,
)
from forge_harness.drill.defects.steps import Accumulates
from forge_harness.errors import NonFiniteError
from forge_harness.protocols import Batch, ModelSpec, StepRecord, TrainOptions
from forge_harness.subject.reference import ReferenceSubject

NON_FINITE = "training.non_finite_stops"
infinite_gradient = partial(after_infinity, place="gradient")
infinite_loss = partial(after_infinity, place="inputs")
infinite_first_loss = partial(after_infinity, place="inputs", accumulation=2)


class _DropsMicroBatch(Accumulates):
    """`if not isfinite(loss): continue` in the loop over micro-batches."""

    def _backward(self, loss: Tensor) -> None:
        if torch.isfinite(loss):
            super()._backward(loss)

    def _accumulate(self, micro_batches: Sequence[tuple[int, ...]]) -> float:
        total = super()._accumulate(micro_batches)
        return total if len(micro_batches) == 1 or math.isfinite(total) else 1.0


def _unguarded(session: Any) -> None:
    session._refuse_non_finite = lambda loss, norm: None
    session.recipe = replace(session.recipe, clip_norm=math.inf)


def _guards_the_loss_only(session: Any) -> None:
    kept = session._refuse_non_finite
    session._refuse_non_finite = lambda loss, norm: kept(loss, 0.0)


def _skips_in_silence(session: Any) -> None:
    stepping = session.step
    last: list[Any] = []

    def step() -> Any:
        with suppress(NonFiniteError):
            last[:] = [stepping()]
        return last[0]

    session.step = step


def _clears_after_updates_only(session: Any) -> None:
    """A step that is not finite is skipped aloud; its gradients stay, and spoil all later ones."""
    stepping, clear = session.step, session.optimizer.zero_grad
    session.optimizer.zero_grad = lambda set_to_none=True: None

    def step() -> Any:
        try:
            record = stepping()
        except NonFiniteError:
            return StepRecord(
                step=session.step_index,
                loss=0.0,
                learning_rate=0.0,
                weight_decay=0.0,
                grad_norm=math.nan,
                sample_ids=(0,),
                seconds=1e-3,
            )
        clear(set_to_none=True)
        return record

    session.step = step


def _never_updates_again(session: Any) -> None:
    """The flag of a step that is not finite is set and never reset: all later ones are skipped."""
    stepping = session.step

    def step() -> Any:
        try:
            return stepping()
        except NonFiniteError:
            session.optimizer.step = lambda closure=None: None
            raise

    session.step = step


def after_nan(subject: Any) -> object:
    """Whether the step after one with an infinite gradient is finite, and how many weights move."""
    session = subject.session("digits", TrainOptions(steps=4))
    weight: Any = largest(session)
    handle = weight.register_hook(lambda gradient: gradient + math.inf)
    with suppress(NonFiniteError):
        session.step()
    handle.remove()
    before = copies(session.model)
    finite = math.isfinite(session.step().grad_norm)
    after = copies(session.model)
    return finite, sum(not torch.equal(before[name], after[name]) for name in before)


class _Pair(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.inner(x), None


class ReturnsPairs(ReferenceSubject):
    """Models that return their logits and something else."""

    def model_spec(self, task: str) -> ModelSpec:
        """The reference's, with names one module deeper."""
        spec = super().model_spec(task)

        def inner(names: Sequence[str]) -> tuple[str, ...]:
            return tuple(f"inner.{name}" for name in names)

        return replace(
            spec,
            quantized=inner(spec.quantized),
            full_precision=inner(spec.full_precision),
            sub_norms=inner(spec.sub_norms),
            tied=tuple((f"inner.{one}", f"inner.{two}") for one, two in spec.tied),
        )

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The reference model in a module that returns a pair."""
        return _Pair(super().build_model(task, seed=seed))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the logits."""
        logits, _ = model(batch.inputs)
        return F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten())


class _SkipsBadLosses(ReturnsPairs):
    """A step whose loss is not finite is left out in silence; gradients are guarded aloud."""

    def session(self, task: str, options: TrainOptions) -> Any:
        session: Any = super().session(task, options)
        stepping, guarding = session.step, session._refuse_non_finite
        last: list[Any] = []

        def refuse(loss: float, norm: float) -> None:
            if not math.isfinite(loss):
                raise StopIteration
            guarding(loss, norm)

        def step() -> Any:
            try:
                last[:] = [stepping()]
            except StopIteration:
                session.optimizer.zero_grad(set_to_none=True)
            return last[0]

        session.step, session._refuse_non_finite = step, refuse
        return session


DEFECTS = (
    Defect(
        id="no_guard",
        title="Nothing looks at what is not finite: a NaN gradient reaches the weights",
        stage=Stage.TRAINING,
        check=NON_FINITE,
        shows="nan_in_one_gradient.changed is",
        subject=lambda: SessionDefect(_unguarded),
        alive=infinite_gradient,
        subtlety=2,
    ),
    Defect(
        id="no_guard_for_text",
        title="Nothing looks at what is not finite in the text task: a NaN reaches its weights",
        stage=Stage.TRAINING,
        check=NON_FINITE,
        shows="bytes.nan_in_one_gradient.changed is",
        subject=lambda: SessionDefect(of_text(_unguarded)),
        alive=partial(infinite_gradient, task="bytes"),
        subtlety=4,
    ),
    Defect(
        id="guard_on_loss_only",
        title="The guard looks at the loss and not at the gradients",
        stage=Stage.TRAINING,
        check=NON_FINITE,
        shows="nan_in_one_gradient.changed is",
        subject=lambda: SessionDefect(_guards_the_loss_only),
        alive=infinite_gradient,
        subtlety=3,
    ),
    Defect(
        id="skips_in_silence",
        title="A step that is not finite is left out, and the step before reported again",
        stage=Stage.TRAINING,
        check=NON_FINITE,
        shows="nan_in_one_gradient.reported is",
        subject=lambda: SessionDefect(_skips_in_silence),
        alive=infinite_gradient,
        subtlety=3,
    ),
    Defect(
        id="drops_a_micro_batch",
        title="A micro-batch whose loss is not finite is left out of its step in silence",
        stage=Stage.TRAINING,
        check=NON_FINITE,
        shows="nan_in_the_first_of_two_losses.changed is",
        subject=lambda: SessionDefect(as_kind(_DropsMicroBatch)),
        alive=infinite_first_loss,
        subtlety=4,
    ),
    Defect(
        id="skips_bad_losses_of_a_model_that_returns_tuples",
        title="A step whose loss is not finite is left out in silence, of models with two outputs",
        stage=Stage.TRAINING,
        check=NON_FINITE,
        shows="nan_in_the_loss.reported is",
        subject=_SkipsBadLosses,
        alive=infinite_loss,
        subtlety=3,
    ),
    Defect(
        id="stuck_after_nan",
        title="Gradients are cleared after an update only: one NaN stays in them for ever",
        stage=Stage.TRAINING,
        check=NON_FINITE,
        shows="nan_in_one_gradient.finite_after is",
        subject=lambda: SessionDefect(_clears_after_updates_only),
        alive=after_nan,
        subtlety=4,
    ),
    Defect(
        id="never_updates_again",
        title="The flag that skips a step that is not finite is never reset: no later one updates",
        stage=Stage.TRAINING,
        check=NON_FINITE,
        shows="nan_in_one_gradient.moved_after is 0",
        subject=lambda: SessionDefect(_never_updates_again),
        alive=after_nan,
        subtlety=4,
    ),
)

BENIGN = (
    Benign(
        id="returns_pairs",
        title="Models that return their logits and something else",
        subject=ReturnsPairs,
        checks=(NON_FINITE, "training.gradient_reaches_all"),
    ),
)
