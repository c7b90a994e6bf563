"""The estimator is held at the layers of the model, not only at the hook `linear`."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from forge_harness.drill.defects import all_benign
from forge_harness.types import Outcome

PATH = Path(__file__).parents[1] / "subject" / "foreign_language_model.py"
SPEC = importlib.util.spec_from_file_location("foreign_language_model", PATH)
foreign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(foreign)

INPUT, WEIGHT = "training.ste_input_gradient", "training.ste_weight_gradient"


@pytest.mark.parametrize("check", [INPUT, WEIGHT])
@pytest.mark.parametrize("kind", ["arithmetic_of_its_own", "reentrantly_checkpointed"])
def test_layers_that_are_right_are_compared_and_green(run_check, check, kind):
    result = run_check(check, all_benign()[kind].subject())
    assert result.outcome is Outcome.PASS, result.reason
    assert result.evidence("digits.layers_compared") == 6
    assert result.evidence("bytes.layers_compared") == 14


@pytest.mark.parametrize("check", [INPUT, WEIGHT])
def test_layers_that_cannot_be_compared_are_named(run_check, check):
    result = run_check(check, all_benign()["hidden_transform"].subject())
    assert result.outcome is Outcome.WARN, result.reason
    assert "digits.layers_unexplained is 6" in result.reason
    assert "stem" in result.reason or "blocks.0.up" in result.reason


class WithItsReference(foreign.Words):
    """The model holds what it began as, which the loss asks and nobody trains (DPO, KL)."""

    trained = False

    class net(foreign.Net):
        def __init__(self, seed):
            super().__init__(seed)
            self.reference = foreign.Net(5)

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        model.reference.requires_grad_(self.trained)
        return model

    def loss(self, model, batch):
        logits = model(batch.inputs).log_softmax(-1)
        with torch.no_grad():
            asked = model.reference(batch.inputs).softmax(-1)
        return F.kl_div(logits.flatten(0, 1), asked.flatten(0, 1), reduction="batchmean")

    def model_spec(self, task):
        spec = super().model_spec(task)
        both = (*spec.quantized, *(f"reference.{name}" for name in foreign.NAMES))
        return replace(spec, quantized=both)

    def latent_weights(self, model):
        names = self.model_spec("words").quantized
        return {name: model.get_submodule(name).weight for name in names}


class WithATrainedReference(WithItsReference):
    """It is to be trained as well, and no gradient reaches it."""

    trained = True


@pytest.mark.parametrize("check", [INPUT, WEIGHT])
def test_a_reference_model_that_is_only_asked_has_no_gradient_to_hold(run_check, check):
    result = run_check(check, WithItsReference())
    assert result.outcome is Outcome.PASS, result.reason
    assert result.evidence("words.layers_compared") == len(foreign.NAMES)


@pytest.mark.parametrize("check", [INPUT, WEIGHT])
def test_layers_that_are_trained_and_only_asked_are_named(run_check, check):
    result = run_check(check, WithATrainedReference())
    assert result.outcome is Outcome.WARN, result.reason
    assert "reference.blocks.0.q" in result.reason
