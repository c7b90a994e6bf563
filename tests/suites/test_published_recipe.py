"""Layers that normalise their input in their own forward: sound ones pass, broken ones do not."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from forge_harness.types import Outcome

BESIDE = Path(__file__).parents[1] / "subject"
FORWARD = "architecture.quantized_modules"
GRADIENTS = ("training.ste_input_gradient", "training.ste_weight_gradient")
CHECKS = (
    FORWARD,
    *GRADIENTS,
    "architecture.sub_norm_present",
    "training.gradient_reaches_all",
    "training.loss_within_band",
)


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BESIDE))
    return importlib.import_module("published_recipe")


def subject_of(module, *, autocast=False, **changes):
    """The recipe with layers of which these methods are others."""
    subject = module.Published(autocast=autocast)
    subject.layer = type("BitLinear", (module.BitLinear,), changes)
    return subject


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("check", CHECKS)
def test_the_published_recipe_is_no_false_alarm(run_check, module, check, autocast):
    run = run_check(check, module.Published(autocast=autocast))
    assert run.outcome is Outcome.PASS, run.reason


def rotated(x):
    """The Hadamard transform in front of BitNet v2's codes."""
    matrix = torch.ones(1, 1)
    while len(matrix) < x.shape[-1]:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return x @ (matrix * len(matrix) ** -0.5).to(x)


@pytest.mark.parametrize("check", [FORWARD, *GRADIENTS])
def test_layers_that_rotate_their_input_are_no_false_alarm(run_check, module, check):
    class Rotates(module.Published):
        layer = type("BitLinear", (module.BitLinear,), {"normalise": lambda self, x: rotated(x)})

        def quantized_input(self, model, name, x):
            return rotated(x)

    run = run_check(check, Rotates())
    assert run.outcome is Outcome.PASS, run.reason


class SlightlyOff(torch.autograd.Function):
    """Passes a gradient that is off by 5e-5 of itself."""

    @staticmethod
    def forward(ctx, x):
        from published_recipe import activation_values

        return activation_values(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 5e-5)


def test_layers_that_do_nothing_to_their_input_are_held_more_sharply(run_check, module):
    """The limit of a gradient through something else is wider than that of a product alone."""

    class Plain(module.Published):
        def quantized_input(self, model, name, x):
            return x

    subject = Plain()
    changes = {"normalise": lambda self, x: x, "quantize": lambda self, x: SlightlyOff.apply(x)}
    subject.layer = type("BitLinear", (module.BitLinear,), changes)
    run = run_check(GRADIENTS[0], subject)
    assert run.outcome is Outcome.FAIL, run.reason
    assert "layer_error is" in run.reason


def test_what_nobody_says_fails_and_names_the_way(run_check, module):
    class Silent(module.Published):
        quantized_input = None

    run = run_check(FORWARD, Silent())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "code in its forward by quantized_input" in run.reason


def not_in_evaluation(self, x):
    from published_recipe import normalised

    return normalised(x) if self.training else x


def normalised_twice_as_large(self, x):
    from published_recipe import normalised

    return 2 * normalised(x)


def not_quantized(self, x):
    return x


class Masked(torch.autograd.Function):
    """Passes no gradient where the code is the largest: a clipped estimator."""

    @staticmethod
    def forward(ctx, x):
        from published_recipe import activation_values

        ctx.save_for_backward(x.abs() < x.abs().amax(-1, keepdim=True))
        return activation_values(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


def norm_without_gradient(self, x):
    """The statistics are taken for constants."""
    return x * torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + 1e-9)


class OfRawInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        from published_recipe import activation_values, weight_values

        values = weight_values(weight)
        ctx.save_for_backward(x, values)
        return nn.functional.linear(activation_values(x), values)

    @staticmethod
    def backward(ctx, grad):
        x, values = ctx.saved_tensors
        return grad @ values.to(grad.dtype), grad.flatten(0, -2).T.float() @ x.flatten(
            0, -2
        ).float()


def with_gradient_of_raw_inputs(self, x):
    return OfRawInputs.apply(self.normalise(x), self.weight)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize(
    ("check", "changes"),
    [
        (FORWARD, {"normalise": not_in_evaluation}),
        (FORWARD, {"normalise": normalised_twice_as_large}),
        (FORWARD, {"quantize": not_quantized}),
        (GRADIENTS[0], {"quantize": lambda self, x: Masked.apply(x)}),
        (GRADIENTS[0], {"normalise": norm_without_gradient}),
        (GRADIENTS[1], {"forward": with_gradient_of_raw_inputs}),
    ],
    ids=["no_norm", "twice", "not_quantized", "masked", "constants", "raw_inputs"],
)
def test_a_broken_layer_is_found(run_check, module, check, changes, autocast):
    run = run_check(check, subject_of(module, autocast=autocast, **changes))
    assert run.outcome is Outcome.FAIL, run.reason
    assert "_error is" in run.reason


def test_what_layers_do_to_their_inputs_need_not_be_a_norm(run_check, module):
    """Then no norm is held, and the check says so; a norm that depends on the scale fails."""

    class Rotates(module.Published):
        def quantized_input(self, model, name, x):
            return x.roll(1, -1)

    class Leaks(module.Published):
        def quantized_input(self, model, name, x):
            return module.normalised(x) * (1 + 1e-4 * x.abs().amax().log())

    check = "architecture.sub_norm_present"
    run = run_check(check, Rotates())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "nor layers that normalise" in run.reason
    run = run_check(check, Leaks())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "scale_leak is" in run.reason
