"""BitLinear: quantizes in both modes, bias outside the scale, norm in front, copies cleanly."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from forge_harness.model import BitLinear, RMSNorm
from forge_harness.quant import TernaryLinearOp, absmean_ternary


def layer(seed: int = 0, **options: object) -> BitLinear:
    torch.manual_seed(seed)
    made = BitLinear(24, 12, **options)
    if made.bias is not None:
        torch.nn.init.normal_(made.bias)
    return made


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def test_training_and_evaluation_compute_the_same():
    module = layer(bias=True, sub_norm=True)
    x = draw(5, 24)
    assert torch.equal(module.train()(x), module.eval()(x))


def test_the_weight_in_use_is_ternary_and_the_latent_is_not():
    module = layer()
    values = module.effective_weight()
    codes, scale = absmean_ternary(module.weight)
    assert torch.equal(values, codes * scale)
    assert values.unique().numel() == 3
    assert module.weight.unique().numel() > 200
    assert not values.requires_grad


def test_the_norm_stands_in_front_of_the_quantization():
    module = layer(sub_norm=True)
    x = draw(5, 24)
    plain = layer()
    assert torch.equal(module(x), plain(F.rms_norm(x, (24,), eps=1e-5)))
    torch.testing.assert_close(module(1000 * x), module(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        module.norm.weight.fill_(2.0)
    torch.testing.assert_close(module(x), 2 * plain(F.rms_norm(x, (24,), eps=1e-5)))


def test_the_bias_is_added_unscaled():
    module = layer(bias=True)
    assert torch.equal(module(torch.zeros(3, 24)), module.bias.expand(3, -1))


def test_full_precision_is_the_plain_layer_with_the_same_state():
    module = layer(bias=True, sub_norm=True, precision="full")
    x = draw(5, 24)
    expected = F.linear(F.rms_norm(x, (24,), eps=1e-5), module.weight, module.bias)
    assert torch.equal(module(x), expected)
    assert module.effective_weight().data_ptr() == module.weight.data_ptr()
    ternary = layer(seed=1, bias=True, sub_norm=True)
    ternary.load_state_dict(module.state_dict())
    assert torch.equal(ternary.weight, module.weight)
    assert not torch.equal(ternary(x), module(x))


def test_parts_have_a_scale_each_in_forward_and_effective_weight():
    module = layer(bias=True, parts=(8, 4))
    with torch.no_grad():
        module.weight[8:] *= 20
    x = draw(5, 24)
    op = TernaryLinearOp()
    weight, bias = module.weight, module.bias
    pieces = [op(x, weight[:8], bias[:8]), op(x, weight[8:], bias[8:])]
    assert torch.equal(module(x), torch.cat(pieces, dim=-1))
    expected = torch.cat([op.effective_weight(weight[:8]), op.effective_weight(weight[8:])])
    assert torch.equal(module.effective_weight(), expected)
    module(x).sum().backward()
    assert module.weight.grad.isfinite().all()


def test_an_injected_arithmetic_is_used_and_probed_for_its_weight():
    def double(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, 2 * w, bias)

    module = layer(linear=double, bias=True)
    x = draw(5, 24)
    assert torch.equal(module(x), F.linear(x, 2 * module.weight, module.bias))
    torch.testing.assert_close(module.effective_weight(), 2 * module.weight.detach())


def test_the_probe_finds_the_ternary_values_of_a_bound_method():
    class Subject:
        def linear(self, x, w, bias=None):
            return TernaryLinearOp()(x, w, bias)

    module = layer(linear=Subject().linear)
    values = module.effective_weight()
    assert values.unique().numel() == 3
    torch.testing.assert_close(values, layer().effective_weight())


def test_a_copy_is_independent_and_shares_the_arithmetic():
    class Subject:
        def linear(self, x, w, bias=None):
            return TernaryLinearOp()(x, w, bias)

    subject = Subject()
    module = layer(linear=subject.linear, sub_norm=True, bias=True)
    model = torch.nn.Sequential(module, module)
    twin = copy.deepcopy(model)
    assert twin[0] is twin[1]
    assert twin[0].linear.__self__ is subject
    x = draw(2, 24)
    assert torch.equal(twin[0](x), module(x))
    with torch.no_grad():
        twin[0].weight.zero_()
    assert module.weight.any()


def test_the_state_dict_holds_parameters_only():
    assert list(layer().state_dict()) == ["weight"]
    expected = ["weight", "bias", "norm.weight"]
    assert list(layer(bias=True, sub_norm=True, parts=(6, 6)).state_dict()) == expected


def test_weights_are_drawn_with_variance_one_over_fan_in():
    torch.manual_seed(0)
    module = BitLinear(400, 500)
    assert float(module.weight.detach().std()) == pytest.approx(400**-0.5, rel=0.01)
    module.reset_parameters(gain=0.1)
    assert float(module.weight.detach().std()) == pytest.approx(0.1 * 400**-0.5, rel=0.01)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"'fulll'.*Did you mean 'full'"):
        layer(precision="fulll")
    with pytest.raises(ValueError, match="12 rows"):
        layer(parts=(6, 7))


def test_the_norm_computes_in_fp32():
    norm = RMSNorm(64)
    x = draw(8, 64) * 300
    y = norm(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    expected = norm(x.to(torch.bfloat16).float()).to(torch.bfloat16)
    assert torch.equal(y, expected)
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(8))
    assert norm(torch.zeros(2, 64)).eq(0).all()
