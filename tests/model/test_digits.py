"""The digits model: every linear ternary, first and last included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from forge_harness.model import BitLinear, DigitsConfig, DigitsModel
from forge_harness.quant import TernaryLinearOp


@pytest.mark.parametrize(
    "config",
    [DigitsConfig(), DigitsConfig(sub_norm=False), DigitsConfig(width=16, hidden=40, blocks=3)],
)
def test_the_formula_counts_the_parameters(config):
    model = DigitsModel(config)
    assert model.parameter_formula() == sum(p.numel() for p in model.parameters())


def test_every_linear_is_ternary():
    model = DigitsModel()
    linears = [name for name, m in model.named_modules() if isinstance(m, BitLinear | nn.Linear)]
    assert list(model.quantized_names()) == linears
    assert model.full_precision_names() == ()
    assert sum(model.get_submodule(n).weight.numel() for n in linears) == 37_504
    assert model.sub_norm_names() == ("blocks.0.down.norm", "blocks.1.down.norm")
    assert DigitsModel(DigitsConfig(sub_norm=False)).sub_norm_names() == ()


def test_the_full_precision_arm_has_the_same_state_and_no_ternary_layer():
    torch.manual_seed(0)
    ternary = DigitsModel()
    torch.manual_seed(0)
    full = DigitsModel(precision="full")
    assert full.quantized_names() == ()
    assert full.full_precision_names() == ternary.quantized_names()
    for name, value in ternary.state_dict().items():
        assert torch.equal(full.state_dict()[name], value)


@pytest.mark.parametrize("sub_norm", [True, False])
def test_the_forward_is_the_written_formula(sub_norm):
    torch.manual_seed(0)
    model = DigitsModel(DigitsConfig(sub_norm=sub_norm), precision="full")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    state = {name: value.double() for name, value in model.state_dict().items()}

    def rms(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    pixels = torch.rand(5, 64)
    x = pixels.double() @ state["stem.weight"].T
    for i in range(2):
        up = rms(x, state[f"blocks.{i}.norm.weight"]) @ state[f"blocks.{i}.up.weight"].T
        hidden = up.clamp(min=0) ** 2
        if sub_norm:
            hidden = rms(hidden, state[f"blocks.{i}.down.norm.weight"])
        x = x + hidden @ state[f"blocks.{i}.down.weight"].T
    expected = x @ state["head.weight"].T
    torch.testing.assert_close(model(pixels).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_few_steps_learn_a_separable_problem():
    torch.manual_seed(0)
    model = DigitsModel(linear=TernaryLinearOp(compute="int8"))
    centres = torch.rand(10, 64)
    labels = torch.arange(10).repeat(8)
    pixels = (centres[labels] + 0.05 * torch.randn(80, 64)).clamp(0, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(pixels), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_the_residual_multiplier_scales_the_initial_down_projection():
    deviations = []
    for gain in (1.0, 0.1):
        torch.manual_seed(0)
        down = DigitsModel(DigitsConfig(residual_init=gain)).blocks[1].down
        deviations.append(float(down.weight.detach().std()))
    assert deviations[1] / deviations[0] == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("name", ["inputs", "width", "hidden", "classes"])
def test_sizes_that_no_model_has_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} 0; expected 1 to"):
        DigitsConfig(**{name: 0})
    with pytest.raises(TypeError, match=f"{name} 1.5; expected an integer"):
        DigitsConfig(**{name: 1.5})
