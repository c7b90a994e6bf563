"""Each architecture check goes red for a seeded defect, for its own reason, and only then."""

import importlib.util
from pathlib import Path

import pytest
import torch

from forge_harness.drill.defects import all_benign, all_defects, defects_of
from forge_harness.policy import load_policy
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

CHECKS = sorted(e.id for e in load_policy().catalogue if e.suite == "architecture")
DEFECTS = defects_of("architecture")


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.id)
def test_defect_turns_the_check_red(run_check, defect):
    result = run_check(defect.check, defect.subject())
    assert result.outcome is Outcome.FAIL, result.reason
    assert defect.shows in result.reason


@pytest.mark.parametrize("check", CHECKS)
def test_reference_is_green(run_check, check):
    result = run_check(check, ReferenceSubject())
    assert result.outcome is Outcome.PASS, result.reason


def test_every_check_has_a_defect():
    assert {defect.check for defect in DEFECTS} == set(CHECKS)


def foreign_subject():
    """A subject with a model and layers of its own, loaded as a user's file is."""
    path = Path(__file__).parents[1] / "subject" / "foreign_subject.py"
    spec = importlib.util.spec_from_file_location("foreign_subject", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Blobs()


SOUND = {
    "foreign": foreign_subject,
    **{kind.id: kind.subject for kind in all_benign().values() if "architecture" in kind.checks},
}
ONE_SCALE = {
    f"architecture.{check}"
    for check in (
        "weight_scale",
        "weight_rounding",
        "zero_and_tiny_rows",
        "integer_path_exact",
        "fake_quant_agrees",
        "bias_outside_scale",
        "permutation_relations",
    )
}
"""Checks whose oracle knows one scale a weight."""


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_subject_of_another_kind_is_not_red(run_check, check, kind):
    result = run_check(check, SOUND[kind]())
    if kind == "scale_a_row_declared" and check in ONE_SCALE:
        assert result.outcome is Outcome.NOT_MEASURED
        assert "one scale a row is declared" in result.reason
        return
    # The foreign subject has no causal model, no packing and no fused weight.
    rest = {Outcome.NOT_MEASURED, Outcome.NOT_APPLICABLE} if kind == "foreign" else set()
    assert result.outcome in {Outcome.PASS, *rest}, result.reason


SOUND_FOR = [
    (kind, check)
    for kind in all_benign().values()
    for check in kind.checks
    if check.startswith("architecture.")
]


@pytest.mark.parametrize(("kind", "check"), SOUND_FOR, ids=lambda part: getattr(part, "id", part))
def test_a_sound_subject_is_green_for_the_checks_it_names(run_check, kind, check):
    result = run_check(check, kind.subject())
    assert result.outcome is Outcome.PASS, result.reason


@pytest.mark.parametrize(
    ("kind", "compared"),
    [("says_bf16", 0), ("takes_float32_only", 0), ("upcasts_with_reciprocal", 26)],
)
def test_only_a_quantizer_that_answers_bf16_in_fp32_is_held_to_it(run_check, kind, compared):
    result = run_check("architecture.activation_range", all_benign()[kind].subject())
    assert result.evidence("bf16_inputs") == compared


def test_declaring_rows_hides_nothing(run_check):
    undeclared = all_defects()["Q10_scale_per_row"]
    assert run_check(undeclared.check, undeclared.subject()).outcome is Outcome.FAIL


class RowScales(ReferenceSubject):
    """Computes with a scale a row (N, 1) throughout, and does not declare it."""

    def quantize_weight(self, weight):
        scale = weight.detach().abs().mean(1, keepdim=True).clamp(min=1e-5)
        return (weight.detach() / scale).round().clamp(-1, 1).to(torch.int8), scale

    def linear(self, x, weight, bias=None):
        codes, scale = self.quantize_weight(weight)
        q, s = self.quantize_activation(x.detach())
        w = weight + (codes * scale - weight).detach()
        y = (x + (q * s - x).detach()) @ w.T
        return y if bias is None else y + bias

    def integer_linear(self, x, weight):
        (codes, scale), (q, s) = self.quantize_weight(weight), self.quantize_activation(x)
        return q.int() @ codes.int().T, s * scale.T


@pytest.mark.parametrize(
    "check",
    [
        "architecture.zero_and_tiny_rows",
        "architecture.integer_path_exact",
        "architecture.fake_quant_agrees",
        "architecture.bias_outside_scale",
        "training.ste_input_gradient",
    ],
)
def test_scales_a_row_that_nobody_declared_are_named_by_one_check(run_check, check):
    """They were errors of numpy's about operands in the others."""
    result = run_check(check, RowScales())
    assert result.outcome is Outcome.PASS, result.reason


@pytest.mark.parametrize("check", ["architecture.fake_quant_agrees", "training.ste_input_gradient"])
def test_a_scale_for_each_sign_is_told_what_is_expected(run_check, check):
    class TwoScales(ReferenceSubject):
        def quantize_weight(self, weight):
            codes, scale = super().quantize_weight(weight)
            return codes, torch.stack([scale, scale])

    result = run_check(check, TwoScales())
    assert result.outcome is Outcome.ERROR
    assert "2 scales for a weight" in result.reason
    assert "expected one, or one a row" in result.reason


def test_a_packer_of_another_shape_is_told_so(run_check):
    """It was an error of numpy's about operands."""

    class Plain(ReferenceSubject):
        def pack(self, codes):
            return codes.to(torch.uint8)

        def unpack(self, packed, rows):
            return packed.to(torch.int8)

    result = run_check("architecture.bits_per_weight", Plain())
    assert result.outcome is Outcome.FAIL
    assert "wrong_sizes is" in result.reason
