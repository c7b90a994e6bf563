"""The estimator is held at the layers of the model, not only at the hook `linear`."""

import pytest

from forge_harness.types import Outcome

from .layer_defects import (
    HiddenTransform,
    LayerDefect,
    ReentrantlyCheckpointed,
    clipped,
    latent_in_input_gradient,
    leaks_through_scale,
    masked_at_largest_input,
    raw_activations,
    right,
)

INPUT, WEIGHT = "training.ste_input_gradient", "training.ste_weight_gradient"
DEFECTS = {
    "G03_clipped_in_the_layer": (WEIGHT, clipped),
    "G07_in_the_layer": (WEIGHT, raw_activations),
    "G08_in_the_layer": (WEIGHT, leaks_through_scale),
    "latent_dX_in_the_layer": (INPUT, latent_in_input_gradient),
    "G03_inputs_masked_in_the_layer": (INPUT, masked_at_largest_input),
}


@pytest.mark.parametrize(("check", "back"), DEFECTS.values(), ids=DEFECTS)
def test_defect_turns_the_check_red(run_check, check, back):
    result = run_check(check, LayerDefect(back))
    assert result.outcome is Outcome.FAIL, result.reason
    assert result.reason.startswith("digits.layer_error"), result.reason


@pytest.mark.parametrize("check", [INPUT, WEIGHT])
@pytest.mark.parametrize("subject", [LayerDefect(right), ReentrantlyCheckpointed()])
def test_layers_that_are_right_are_compared_and_green(run_check, check, subject):
    result = run_check(check, subject)
    assert result.outcome is Outcome.PASS, result.reason
    assert result.evidence("digits.layers_compared") == 6
    assert result.evidence("bytes.layers_compared") == 14


@pytest.mark.parametrize("check", [INPUT, WEIGHT])
def test_layers_that_cannot_be_compared_are_named(run_check, check):
    result = run_check(check, HiddenTransform())
    assert result.outcome is Outcome.WARN, result.reason
    assert "digits.layers_unexplained is 6" in result.reason
    assert "stem" in result.reason or "blocks.0.up" in result.reason
