"""Steps of subjects whose optimizer or model is of another kind."""

import importlib.util
from pathlib import Path

import pytest
import torch.nn.functional as F

from forge_harness.drill.defects import all_benign
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

PATH = Path(__file__).parents[1] / "subject" / "foreign_language_model.py"
SPEC = importlib.util.spec_from_file_location("foreign_language_model", PATH)
foreign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(foreign)


def test_an_optimizer_of_ones_own_is_green(run_check):
    result = run_check("training.schedule_trace", all_benign()["adam_of_ones_own"].subject())
    assert result.outcome is Outcome.PASS, result.reason
    assert 0 < result.evidence("digits.rate_response") < 1


@pytest.mark.parametrize("check", ["non_finite_stops", "gradient_reaches_all"])
def test_a_model_that_returns_tuples_is_reached(run_check, check):
    result = run_check(f"training.{check}", all_benign()["returns_pairs"].subject())
    assert result.outcome is Outcome.PASS, result.reason
    name = "nan_in_the_loss.injected" if check == "non_finite_stops" else "digits.targets_moved"
    assert result.evidence(name) >= 1


class CallsForward(ReferenceSubject):
    """Calls `forward` of its models, which torch's hooks do not see."""

    def loss(self, model, batch):
        from forge_harness.training import training_loss

        return training_loss(model.forward, batch)


def test_a_fault_that_cannot_be_put_in_is_not_measured(run_check):
    """It was a warning, which fails a critical check."""
    result = run_check("training.non_finite_stops", CallsForward())
    assert result.outcome is Outcome.NOT_MEASURED, result.reason
    assert "3 of 6 faults could not be put in" in result.reason
    assert "nan_in_the_loss" in result.reason
    assert result.evidence("nan_in_the_loss.injected") == 0
    assert result.evidence("nan_in_one_gradient.injected") == 1


class HoldsItsLoss(foreign.Words):
    """Its model returns losses, as models of transformers do, and its loop guards gradients."""

    class net(foreign.Net):
        def forward(self, ids, targets=None):
            logits = super().forward(ids)
            if targets is None:
                return logits
            return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")

    def loss(self, model, batch):
        return model(batch.inputs, batch.targets).mean()


def test_an_infinite_loss_has_gradients_that_are_not_finite(run_check):
    run = run_check("training.non_finite_stops", HoldsItsLoss())
    assert run.outcome is Outcome.PASS, run.reason
    assert run.evidence("inf_in_the_loss.changed") == 0
