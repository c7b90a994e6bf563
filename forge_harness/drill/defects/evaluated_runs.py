"""Runs that are evaluated and trained on: what an evaluation leaves behind shows later."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forge_harness.drill.defect import Defect, Stage
from forge_harness.drill.defects.changed_model import ModelDefect, ternary_layers
from forge_harness.drill.defects.evaluation import CHECK
from forge_harness.drill.defects.sessions import (
    SessionDefect,
    copies,
    in_place_of,
    with_digits_alone,
)
from forge_harness.model import BitLinear
from forge_harness.protocols import TrainOptions


class _CachedInEvaluation(BitLinear):
    """The weight of the first forward in evaluation mode is the one of all later ones."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.precision == "full":
            return super().forward(x)
        kept = vars(self).setdefault("_kept", self.weight.detach().clone())
        with _data_of(self.weight, kept):
            return super().forward(x)


@contextmanager
def _data_of(parameter: nn.Parameter, values: Tensor) -> Iterator[None]:
    live, parameter.data = parameter.data, values
    try:
        yield
    finally:
        parameter.data = live


def _cache_in_evaluation(model: Any) -> None:
    for layer in ternary_layers(model):
        layer.__class__ = _CachedInEvaluation


class _ExportsLastEvaluated(SessionDefect):
    """The weights of the last evaluation are kept, and are what is exported."""

    def __init__(self) -> None:
        super().__init__(_keep_when_evaluating)

    def export_package(self, session: Any, path: Path) -> None:
        with in_place_of(session.model, session.kept or copies(session.model)):
            super().export_package(session, path)


def _keep_when_evaluating(session: Any) -> None:
    evaluate = session.evaluate
    session.kept = None

    def keeping() -> Any:
        session.kept = copies(session.model)
        return evaluate()

    session.evaluate = keeping


def _freeze_when_evaluating(session: Any) -> None:
    evaluate: Callable[[], Any] = session.evaluate

    def freezing() -> Any:
        for parameter in session.model.parameters():
            parameter.requires_grad_(parameter.dim() > 1)
        return evaluate()

    session.evaluate = freezing


def trained_on(subject: Any) -> object:
    """A run with an evaluation in it: its package, what is said at the end, and its state."""
    session = subject.session("digits", TrainOptions(steps=12))
    for _ in range(3):
        session.step()
    session.evaluate()
    for _ in range(5):
        session.step()
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        subject.export_package(session, package)
        score = dict(subject.evaluate_package("digits", package))
    return score, dict(session.evaluate()), dict(session.state_tensors())


@torch.no_grad()
def text_in_evaluation(subject: Any) -> object:
    """Losses of one batch of text in evaluation mode, before and after a step."""
    session = subject.session("bytes", TrainOptions(steps=2, batch_size=2))
    batch = subject.batch("bytes", "validation", range(2))
    losses = [subject.loss(session.model.eval(), batch)]
    session.model.train()
    with torch.enable_grad():
        session.step()
    return [*losses, subject.loss(session.model.eval(), batch)]


DEFECTS = (
    Defect(
        id="L18_cached_in_evaluation",
        title="Ternary weights are made at the first forward in evaluation mode and kept for ever",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="loss_difference is",
        subject=lambda: with_digits_alone(ModelDefect(_cache_in_evaluation)),
        alive=trained_on,
        subtlety=4,
    ),
    Defect(
        id="L18_cached_in_evaluation_of_text",
        title="The text model keeps the ternary weights of its first forward in evaluation mode",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="bytes.loss_difference is",
        subject=lambda: ModelDefect(_cache_in_evaluation, task="bytes"),
        alive=text_in_evaluation,
        subtlety=5,
    ),
    Defect(
        id="E20_exports_last_evaluated",
        title="The weights exported are those of the last evaluation, not the live ones",
        stage=Stage.EXPORT,
        check=CHECK,
        shows="loss_difference is",
        subject=lambda: with_digits_alone(_ExportsLastEvaluated()),
        alive=trained_on,
        subtlety=4,
    ),
    Defect(
        id="T15_frozen_by_evaluating",
        title="Evaluating freezes norms, and nothing thaws them for the steps that follow",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="after_evaluating.first_different_step is",
        subject=lambda: with_digits_alone(SessionDefect(_freeze_when_evaluating)),
        alive=trained_on,
        subtlety=4,
    ),
)
