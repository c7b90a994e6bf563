"""The estimator is held at the layers of the model, not only at the hook `linear`."""

import pytest

from forge_harness.drill.defects import all_benign
from forge_harness.types import Outcome

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
