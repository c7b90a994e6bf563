"""Evaluation: what is measured in the loop and of the package."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from forge_harness import training
from forge_harness.drill import observe
from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.drill.defects.sessions import (
    SessionDefect,
    ternary_layers,
    with_digits_alone,
)
from forge_harness.drill.defects.steps_optimizer import ShiftsTwice
from forge_harness.protocols import Batch, TrainOptions
from forge_harness.subject.reference import ReferenceSubject

CHECK = "training.eval_is_quantized"
BATCH = 100
"""Samples of a batch of the evaluations below."""
Metrics = Callable[[nn.Module, Any, str], dict[str, float]]
"""(model in evaluation mode, data, task) -> loss and accuracy."""


class _Changed:
    """A data source with some of its methods exchanged."""

    def __init__(self, source: Any, **methods: Any) -> None:
        self.source = source
        vars(self).update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


class EvaluatesWith(ReferenceSubject):
    """Loop and package evaluate with one function of their own."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def session(self, task: str, options: TrainOptions) -> Any:
        """A session that evaluates with the function."""
        session: Any = super().session(task, options)
        session.evaluate = lambda: self._evaluate(session.model, task)
        return session

    def evaluate_package(self, task: str, path: Path) -> Mapping[str, float]:
        """The metrics of a package by the function."""
        model = training.load_package(self.build_model(task, seed=0), path)
        return self._evaluate(model, task)

    def _evaluate(self, model: nn.Module, task: str) -> dict[str, float]:
        mode = model.training
        model.eval()
        with torch.no_grad():
            metrics = self.metrics(model, self, task)
        model.train(mode)
        return metrics


def quality(model: nn.Module, data: Any, task: str) -> dict[str, float]:
    """Loss and accuracy of the whole validation split, as they are."""
    found = training.evaluate_model(model, data, task)
    return {"loss": found.loss, "accuracy": found.accuracy}


def _batches(data: Any, task: str) -> list[Batch]:
    size = data.data_info(task).validation_size
    starts = range(0, size, BATCH)
    return [data.batch(task, "validation", range(i, min(i + BATCH, size))) for i in starts]


def _of_the_train_split(model: nn.Module, data: Any, task: str) -> dict[str, float]:
    def batch(task: str, split: str, ids: Any) -> Any:
        return data.batch(task, "train", ids)

    return quality(model, _Changed(data, batch=batch), task)


def _without_the_last_batch(model: nn.Module, data: Any, task: str) -> dict[str, float]:
    info = data.data_info(task)
    whole = info.validation_size // BATCH * BATCH
    changed = replace(info, validation_size=whole)
    return quality(model, _Changed(data, data_info=lambda task: changed), task)


def _with_the_last_batch_filled(model: nn.Module, data: Any, task: str) -> dict[str, float]:
    """The last batch is filled up with the first samples, which count twice."""
    info = data.data_info(task)
    filled = replace(info, validation_size=-(-info.validation_size // BATCH) * BATCH)

    def batch(task: str, split: str, ids: Any) -> Any:
        return data.batch(task, split, [index % info.validation_size for index in ids])

    return quality(model, _Changed(data, batch=batch, data_info=lambda task: filled), task)


def _mean_of_batch_means(model: nn.Module, data: Any, task: str) -> dict[str, float]:
    means = [
        float(F.cross_entropy(model(batch.inputs).flatten(0, -2), batch.targets.flatten()))
        for batch in _batches(data, task)
    ]
    return {**quality(model, data, task), "loss": sum(means) / len(means)}


def _top_two(model: nn.Module, data: Any, task: str) -> dict[str, float]:
    right = []
    for batch in _batches(data, task):
        best = model(batch.inputs).topk(2, dim=-1).indices
        right.append((best == batch.targets[..., None]).any(-1).flatten())
    return {**quality(model, data, task), "accuracy": float(torch.cat(right).double().mean())}


def _one_target_too_many(model: nn.Module, data: Any, task: str) -> dict[str, float]:
    """Each row of text counts one target more than it has."""
    found = quality(model, data, task)
    targets = data.batch(task, "validation", [0]).targets.numel()
    share = targets / (targets + 1) if targets > 1 else 1.0
    return {**found, "loss": found["loss"] * share}


def _exchanged(metrics: Callable[[Any, Callable[[], Any]], Any]) -> Callable[[Any], None]:
    """Returns a patch: `metrics(session, evaluate)` stands for `evaluate()`."""

    def patch(session: Any) -> None:
        kept = session.evaluate
        session.evaluate = lambda: metrics(session, kept)

    return patch


def _of_latents(session: Any, evaluate: Callable[[], Any]) -> Any:
    layers = ternary_layers(session.model)
    for layer in layers:
        layer.precision = "full"
    result = evaluate()
    for layer in layers:
        layer.precision = "ternary"
    return result


def _staying_in_evaluation_mode(session: Any, evaluate: Callable[[], Any]) -> Any:
    result = evaluate()
    session.model.eval()
    return result


def _divided(session: Any, evaluate: Callable[[], Any]) -> Any:
    result = evaluate()
    return {**result, "loss": result["loss"] / session.options.accumulation}


def _moving_the_data(session: Any, evaluate: Callable[[], Any]) -> Any:
    session.position.advance(1)
    return evaluate()


def modes_after_evaluating(subject: Any) -> object:
    """Which modules are in training mode before and after an evaluation."""
    session = subject.session("digits", TrainOptions(steps=2))
    before = {name: module.training for name, module in session.model.named_modules()}
    session.evaluate()
    return before, {name: module.training for name, module in session.model.named_modules()}


def evaluated_text(subject: Any) -> object:
    """What the text task evaluates to before it is trained, on eight samples of its split."""
    info = replace(subject.data_info("bytes"), validation_size=8)
    small = copy.copy(subject)  # The subject is the caller's.
    vars(small)["data_info"] = lambda task: info
    return dict(small.session("bytes", TrainOptions(steps=2)).evaluate())


def _of_digits(metrics: Metrics) -> Callable[[], ReferenceSubject]:
    return lambda: with_digits_alone(EvaluatesWith(metrics))


def _session_of_digits(metrics: Callable[[Any, Callable[[], Any]], Any]) -> Callable[[], object]:
    return lambda: with_digits_alone(SessionDefect(_exchanged(metrics)))


DEFECTS = (
    Defect(
        id="L06_evaluates_latents",
        title="Validation switches the quantizers off and measures the latent model",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="loss_difference is",
        subject=_session_of_digits(_of_latents),
        alive=observe.trained,
        source="pytorch/ao#4336",
        subtlety=4,
    ),
    Defect(
        id="T15_mode_left",
        title="The model stays in evaluation mode after the first validation",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="modes_left_changed is",
        subject=_session_of_digits(_staying_in_evaluation_mode),
        alive=modes_after_evaluating,
        source="fartashf/vsepp#4",
        subtlety=4,
    ),
    Defect(
        id="T16_loss_divided",
        title="The validation loss is divided by the accumulation steps",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="loss_with_accumulation is",
        subject=_session_of_digits(_divided),
        alive=partial(observe.trained, accumulation=4),
        source="pytorch/torchtitan#1758",
        subtlety=4,
    ),
    Defect(
        id="evaluating_moves_data",
        title="Each validation takes a sample from the training data",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="changed_by_evaluating is",
        subject=_session_of_digits(_moving_the_data),
        alive=observe.exported,
        subtlety=4,
    ),
    Defect(
        id="evaluates_the_train_split",
        title="Loop and package are evaluated on training samples",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="loss_off_the_split is",
        subject=_of_digits(_of_the_train_split),
        alive=observe.trained,
        subtlety=3,
    ),
    Defect(
        id="D14_drops_last_batch",
        title="The evaluation leaves out the last, smaller batch",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="loss_off_the_split is",
        subject=_of_digits(_without_the_last_batch),
        alive=observe.trained,
        source="UKGovernmentBEIS/inspect_ai#3211",
        subtlety=4,
    ),
    Defect(
        id="D08_fills_last_batch",
        title="The last batch is filled up with the first samples, which count twice",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="loss_off_the_split is",
        subject=_of_digits(_with_the_last_batch_filled),
        alive=observe.trained,
        source="numenta/nupic.research#264",
        subtlety=5,
    ),
    Defect(
        id="D09_mean_of_means",
        title="The metric is the mean of batch means, the last batch being smaller",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="loss_off_the_split is",
        subject=_of_digits(_mean_of_batch_means),
        alive=observe.trained,
        source="huggingface/transformers#34387",
        subtlety=4,
    ),
    Defect(
        id="counts_the_second_choice",
        title="A hit is counted when the target is among the two best",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="accuracy_off_the_split is",
        subject=_of_digits(_top_two),
        alive=observe.trained,
        subtlety=3,
    ),
    Defect(
        id="T03_denominator_off_by_one",
        title="The metric of text divides by one target a row too many",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="bytes.loss_off_the_split is",
        subject=lambda: EvaluatesWith(_one_target_too_many),
        alive=evaluated_text,
        source="huggingface/transformers#46204",
        subtlety=5,
    ),
    Defect(
        id="T14_shifts_twice",
        title="The training loss shifts targets again that the data have shifted",
        stage=Stage.TRAINING,
        check=CHECK,
        shows="bytes.loss_off_the_split is",
        subject=ShiftsTwice,
        alive=observe.gradients,
        source="huggingface/transformers#47394",
        subtlety=3,
    ),
)

BENIGN = (
    Benign(
        id="evaluation_of_its_own",
        title="Loop and package evaluated by a function of the subject's own",
        subject=lambda: EvaluatesWith(quality),
        checks=(CHECK,),
    ),
)
