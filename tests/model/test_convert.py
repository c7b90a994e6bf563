"""convert_linears: exactly the chosen layers, the same parameters, a reason for every other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from forge_harness.model import BitLinear, convert_linears


class Foreign(nn.Module):
    """A user's model: a head whose name is part of another's, tied weights, a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
        self.subhead = nn.Linear(8, 8)
        self.again = self.subhead
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.subhead(self.body(self.embedding(ids)))))


def reasons(report) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in report.skipped}


def test_everything_that_can_be_converted_is():
    model = Foreign()
    report = convert_linears(model)
    assert report.converted == ("body.0", "body.2", "subhead", "again")
    assert "tied" in reasons(report)["head"]
    assert report.unmatched == ()
    assert model.again is model.subhead
    assert isinstance(model.subhead, BitLinear)
    assert type(model.head) is nn.Linear
    model(torch.arange(5)).sum().backward()


def test_parameters_stay_the_same_objects_so_that_an_optimizer_stays_bound():
    model = Foreign().to(torch.bfloat16).eval()
    model.body[0].weight.requires_grad_(False)
    before = dict(model.named_parameters())
    convert_linears(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not model.body[0].training
    assert not model.body[0].weight.requires_grad


def test_patterns_match_whole_names_and_exclude_wins():
    model = Foreign()
    report = convert_linears(model, include=("body.*", "*head"), exclude=("head", "body.2"))
    assert report.converted == ("body.0", "subhead")
    assert reasons(report) == {
        "body.2": "excluded by 'body.2'",
        "again": "not included",
        "head": "excluded by 'head'",
    }


def test_a_pattern_without_a_match_is_reported():
    report = convert_linears(Foreign(), include=("decoder.*",), exclude=("lm_head",))
    assert report.converted == ()
    assert report.unmatched == ("decoder.*", "lm_head")


def test_layers_that_are_more_than_linear_are_left_alone():
    class Special(nn.Linear):
        pass

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    watched = nn.Linear(4, 4)
    watched.register_full_backward_pre_hook(lambda *_: None)
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: 2 * nn.Linear.forward(patched, x)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleDict(
        {
            "special": Special(4, 4),
            "hooked": hooked,
            "watched": watched,
            "patched": patched,
            "attention": nn.MultiheadAttention(4, 1),
            "normed": parametrized,
        }
    )
    report = convert_linears(model)
    assert report.converted == ()
    kept = {"special", "hooked", "watched", "patched", "attention.out_proj", "normed"}
    assert set(reasons(report)) == kept
    assert "hooks" in reasons(report)["hooked"]


def test_a_converted_encoder_evaluates_with_the_weights_it_trains_with():
    """torch's fused path took the latent weights of converted layers: full precision, unsaid."""

    class Called(nn.TransformerEncoderLayer):
        def forward(self, x):
            return self.linear2(self.activation(self.linear1(x)))

    sizes = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
    model = nn.Sequential(nn.TransformerEncoderLayer(**sizes), Called(**sizes), nn.Linear(16, 16))
    report = convert_linears(model)
    assert report.converted == ("1.linear1", "1.linear2", "2")
    assert "without calling it" in reasons(report)["0.linear1"]
    x = torch.randn(2, 5, 16)
    trained = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained)


def test_a_layer_that_is_compiled_already_is_left_alone():
    """It was reported as converted, and the wrapper went on calling the full-precision one."""
    compiled = torch.compile(nn.Linear(4, 4), backend="eager")
    within = torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager")
    report = convert_linears(nn.Sequential(compiled, within))
    assert report.converted == ("1._orig_mod.0",)
    assert "convert before compiling" in reasons(report)["0._orig_mod"]
    assert type(compiled._orig_mod) is nn.Linear


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_alone_is_refused(option):
    """Its letters were the patterns, and `exclude="head"` converted the head."""
    with pytest.raises(TypeError, match=rf"{option} 'head'; expected a sequence: give \('head',\)"):
        convert_linears(Foreign(), **{option: "head"})


def test_the_root_is_reported_not_replaced():
    assert reasons(convert_linears(nn.Linear(2, 2))) == {"": "the root cannot be replaced in place"}


@pytest.mark.parametrize("sub_norm", [False, True])
def test_the_converted_model_computes_with_ternary_weights(sub_norm):
    model = nn.Sequential(nn.Linear(8, 6))
    convert_linears(model, sub_norm=sub_norm)
    assert model[0].effective_weight().unique().numel() <= 3
    assert (model[0].norm is not None) == sub_norm
    x = torch.randn(3, 8)
    assert torch.equal(model(x), model[0](x))


def test_the_arithmetic_can_be_given():
    def plain(x, w, bias):
        return nn.functional.linear(x, w, bias)

    model = nn.Sequential(nn.Linear(8, 6))
    x = torch.randn(3, 8)
    expected = model(x)
    convert_linears(model, linear=plain)
    assert torch.equal(model(x), expected)
