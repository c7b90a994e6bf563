"""transformers' Trainer, which owns its loop, is no false alarm, and what breaks it is found."""

import importlib
from pathlib import Path

import pytest
import torch

from forge_harness.types import Outcome

BESIDE = Path(__file__).parents[1] / "subject"
EVALUATION = "training.eval_is_quantized"
RESUMPTION = "training.resume_bit_identical"
CHECKS = (
    "data.loader_order",
    "integration.scenario_recovery",
    "training.accumulation_equivalence",
    "training.clip_effective",
    "training.decay_groups",
    EVALUATION,
    "training.non_finite_stops",
    "training.parameters_move",
    "training.partial_window",
    RESUMPTION,
    "training.schedule_trace",
)


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BESIDE))
    found = importlib.import_module("hugging_face_trainer")
    torch.compiler.set_stance("force_eager")
    yield found
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("check", CHECKS)
def test_a_trainer_that_owns_its_loop_is_no_false_alarm(run_check, module, check):
    run = run_check(check, module.Driven())
    assert run.outcome is Outcome.PASS, run.reason


def targets_counted_shifted(module, monkeypatch):
    """Labels that are shifted already: the Trainer counts 47 of 48, and every loss is too large."""
    right = module.Samples.__getitem__

    def shifted(self, place):
        sample = right(self, place)
        return sample | {"labels": sample["labels"][1:]}

    monkeypatch.setattr(module.Samples, "__getitem__", shifted)
    monkeypatch.setattr(module, "loss_of_all", loss_of_shifted)


def loss_of_shifted(outputs, labels, num_items_in_batch=None):
    total = torch.nn.functional.cross_entropy(
        outputs.logits.flatten(0, -2), labels.flatten(), reduction="sum"
    )
    return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def trained_in_evaluation_mode(module, monkeypatch):
    """`model.train()` is lost once the model has been evaluated."""
    evaluate = module.Recording.evaluate

    def staying(self, *given):
        found = evaluate(self, *given)
        self.model.train = lambda mode=True: self.model
        return found

    monkeypatch.setattr(module.Recording, "evaluate", staying)


def steps_on_nan(module, monkeypatch):
    """As the Trainer does by itself."""
    monkeypatch.delattr(module.Pausing, "on_pre_optimizer_step")
    monkeypatch.setattr(module.Pausing, "group", {"lr": 0.0, "weight_decay": 0.1}, raising=False)


def saves_the_model_only(module, monkeypatch):
    arguments = module.TrainingArguments
    monkeypatch.setattr(
        module, "TrainingArguments", lambda **given: arguments(save_only_model=True, **given)
    )


def data_from_the_start(module, monkeypatch):
    arguments = module.TrainingArguments
    monkeypatch.setattr(
        module, "TrainingArguments", lambda **given: arguments(ignore_data_skip=True, **given)
    )


@pytest.mark.parametrize(
    ("broken", "check", "shown"),
    [
        (targets_counted_shifted, "training.partial_window", "gradient_difference"),
        (trained_in_evaluation_mode, EVALUATION, "modes_left_changed"),
        (steps_on_nan, "training.non_finite_stops", "nan_in_one_gradient.changed"),
        (saves_the_model_only, RESUMPTION, "first_different_step"),
        (data_from_the_start, RESUMPTION, "sample_ids"),
    ],
)
def test_a_broken_one_is_found(run_check, module, monkeypatch, broken, check, shown):
    broken(module, monkeypatch)
    run = run_check(check, module.Driven())
    assert run.outcome is Outcome.FAIL, run.reason
    assert shown in run.reason
