"""Each architecture check goes red for a seeded defect, for its own reason, and only then."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from forge_harness.model import BitLinear
from forge_harness.policy import load_policy
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

from .architecture_defects import (
    AnswersWithAMapping,
    AttentionDefect,
    DeclaresPreNorms,
    Dropout,
    KeysReadTheRawStream,
    LayerNorms,
    LayersSwallowMissingKeys,
    NormMissingAndUndeclared,
    NormOverTheBatch,
    NothingQuantized,
    SaysRowsAndHasOne,
    ScaleARow,
    sees_the_next_key_at_block_ends,
    sees_the_next_key_beyond_64_tokens,
)

CHECKS = sorted(e.id for e in load_policy().catalogue if e.suite == "architecture")
EPS = 1e-5


class WeightDefect(ReferenceSubject):
    """A weight quantizer with its scale or its rounding exchanged."""

    def __init__(self, scale=None, rounding=torch.round):
        self.scale = scale or (lambda w: w.abs().mean().clamp(min=EPS))
        self.rounding = rounding

    def quantize_weight(self, weight):
        scale = self.scale(weight.detach())
        codes = self.rounding(weight.detach() / scale).clamp(-1, 1)
        return codes.to(torch.int8), scale


class ActivationDefect(ReferenceSubject):
    """An activation quantizer with its absmax, range or rounding exchanged."""

    def __init__(self, absmax=None, steps=127.0, rounding=torch.round, lowest=-128):
        self.absmax = absmax or (lambda x: x.abs().amax(-1, keepdim=True).clamp(min=EPS))
        self.steps, self.rounding, self.lowest = steps, rounding, lowest

    def quantize_activation(self, x):
        absmax = self.absmax(x.detach())
        codes = self.rounding(x.detach() * (self.steps / absmax))
        # The cast wraps like a C cast does: no clamp.
        return codes.to(torch.int64).to(torch.int8), absmax / self.steps


def half_up(values):
    return torch.floor(values + 0.5)


def first_nonzero(weight):
    values = weight.abs().flatten()
    return values[values > 0][:1].sum().clamp(min=EPS)


def mean_of_chunk_means(weight):
    return torch.stack([chunk.abs().mean() for chunk in weight.split(64)]).mean().clamp(min=EPS)


class RemembersScale(ReferenceSubject):
    def quantize_weight(self, weight):
        codes, scale = super().quantize_weight(weight)
        if not hasattr(weight, "remembered"):
            weight.remembered = scale
        return codes, weight.remembered


class WritesToWeight(ReferenceSubject):
    def quantize_weight(self, weight):
        with torch.no_grad():
            weight.mul_(1.001)
        return super().quantize_weight(weight)


class FloorOnScale(ReferenceSubject):
    """Floors absmax / 127 instead of absmax, and returns the scale without it, as torchao did."""

    def quantize_activation(self, x):
        absmax = x.detach().abs().amax(-1, keepdim=True)
        codes = (x.detach() / (absmax / 127).clamp(min=EPS)).round().clamp(-128, 127)
        return codes.to(torch.int8), (absmax / 127).clamp(min=1e-12)


class IntegerDefect(ReferenceSubject):
    """The integer path with its accumulators passed through `change`."""

    def __init__(self, change):
        self.change = change

    def integer_linear(self, x, weight):
        accumulators, factor = super().integer_linear(x, weight)
        return self.change(accumulators).to(accumulators.dtype), factor


class SwapsFeatures(ReferenceSubject):
    """Codes of features beyond 64 are read from a buffer that lacks the first of them."""

    def integer_linear(self, x, weight):
        if x.shape[-1] > 64:
            x = torch.cat([x[..., :64], x[..., 65:], x[..., :1]], dim=-1)
        return super().integer_linear(x, weight)


class LinearDefect(ReferenceSubject):
    """The training forward with its output changed: `change(subject, y, x, weight, bias)`."""

    def __init__(self, change):
        self.change = change

    def linear(self, x, weight, bias=None):
        return self.change(self, super().linear(x, weight, bias), x, weight, bias)


def bf16_reciprocal(subject, y, x, weight, bias):
    beta = subject.quantize_weight(weight)[1]
    return y / beta / (1 / beta).bfloat16().float()


def no_activation_scale(subject, y, x, weight, bias):
    return y / subject.quantize_activation(x)[1]


def a16_without_gradient(subject, y, x, weight, bias):
    if torch.is_grad_enabled():
        return y
    codes, scale = subject.quantize_weight(weight)
    return F.linear(x, codes * scale, bias)


def bias_inside_scale(subject, y, x, weight, bias):
    if bias is None:
        return y
    scale = subject.quantize_activation(x)[1] * subject.quantize_weight(weight)[1]
    return y - bias + (bias / scale).round() * scale


def divides_by_weight(subject, y, x, weight, bias):
    return y + 0.0 * (weight / weight.abs().mean()).sum()


def flushes_small(subject, y, x, weight, bias):
    return y * (x.abs().amax(-1, keepdim=True) > 1e-3)


def offset_by_sign(subject, y, x, weight, bias):
    return y + 1e-6 * y.abs()


class SharedScale(ReferenceSubject):
    def quantize_weight_parts(self, weight, parts):
        codes, scale = self.quantize_weight(weight)
        return codes, scale.expand(len(parts)).clone()


class ModelDefect(ReferenceSubject):
    """The reference model of the tasks, changed in place after it is built."""

    def __init__(self, change, **spec_changes):
        self.change = change

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        self.change(model)
        return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, BitLinear)]


def drop_sub_norm(model):
    for layer in layers(model):
        if layer.norm is not None:
            layer.norm = nn.Identity()


def bypass_sub_norm(model):
    for layer in layers(model):
        if layer.norm is not None:
            layer.norm.register_forward_hook(lambda module, args, out: args[0])


def batch_statistics(model):
    for layer in layers(model):
        if layer.norm is not None:
            layer.norm.register_forward_hook(
                lambda module, args, out: args[0] / args[0].square().mean().sqrt()
            )


def extra_bias(model):
    layer = layers(model)[0]
    layer.bias = nn.Parameter(torch.zeros(layer.out_features))


def frozen_layer(model):
    layers(model)[0].weight.requires_grad_(False)


def one_layer_full_precision(model):
    layer = layers(model)[-1]
    layer.forward = lambda x: F.linear(x, layer.weight)


def a16_in_evaluation(model):
    layer = layers(model)[-1]
    ternary = layer.forward

    def forward(x):
        if layer.training:
            return ternary(x)
        x = x if layer.norm is None else layer.norm(x)
        return F.linear(x, layer.effective_weight())

    layer.forward = forward


def per_tensor_activations(model):
    for layer in layers(model):
        kept = layer.linear

        def linear(x, w, b=None, kept=kept):
            scale = x.abs().amax() / 127
            codes, beta = kept.quantize_weight(w)
            return F.linear((x / scale).round() * scale, codes * beta, b)

        linear.effective_weight = kept.effective_weight
        layer.linear = linear


def quantized_head(model):
    head = getattr(model, "head", None)
    if isinstance(head, nn.Linear):
        head.forward = lambda x: BitLinear.forward(converted(head), x)


def converted(linear):
    layer = BitLinear(linear.in_features, linear.out_features)
    layer.weight = linear.weight
    return layer


def undeclared_layer(model):
    model.adapter = nn.Linear(3, 3)


class LatentInEvaluation(ReferenceSubject):
    def effective_weights(self, model):
        if model.training:
            return super().effective_weights(model)
        return {name: p.detach() for name, p in self.latent_weights(model).items()}


class ScalePerRow(ReferenceSubject):
    def effective_weights(self, model):
        return {
            name: values.sign() * self.latent_weights(model)[name].detach().abs().mean(1, True)
            for name, values in super().effective_weights(model).items()
        }


class TwiceQuantized(ReferenceSubject):
    def effective_weights(self, model):
        effective = super().effective_weights(model)
        return {name: self._op().effective_weight(values) for name, values in effective.items()}


class StaleEffective(ReferenceSubject):
    """Quantizes a model's weights once and remembers them."""

    def effective_weights(self, model):
        if not hasattr(model, "remembered"):
            object.__setattr__(model, "remembered", super().effective_weights(model))
        return model.remembered


def future_leak(model):
    attention = F.scaled_dot_product_attention

    def unmasked(*args):
        F.scaled_dot_product_attention = lambda q, k, v, is_causal: attention(q, k, v)

    def restore(*args):
        F.scaled_dot_product_attention = attention

    if hasattr(model, "embedding"):
        model.register_forward_pre_hook(unmasked)
        model.register_forward_hook(restore)


def off_by_one_mask(model):
    if hasattr(model, "embedding"):
        # Each position also sees the next one, as tril(diagonal=1) lets it.
        model.blocks[0].attention.register_forward_hook(
            lambda module, args, out: out + 0.01 * out.roll(-1, dims=1)
        )


class ScaleOverTime(ReferenceSubject):
    def quantize_activation(self, x):
        over = -2 if x.dim() > 2 else -1
        absmax = x.detach().abs().amax(over, keepdim=True).clamp(min=EPS)
        scale = absmax.amax(-1, keepdim=True) if over == -2 else absmax
        scale = scale.expand(*x.shape[:-1], 1) / 127
        return (x.detach() / scale).round().clamp(-128, 127).to(torch.int8), scale


def untied(model):
    if hasattr(model, "embedding"):

        def untie(module, *args):
            module.head.weight = nn.Parameter(module.head.weight.detach().clone())

        model.register_load_state_dict_post_hook(untie)


def lenient_load(model):
    strictly = model.load_state_dict
    model.load_state_dict = lambda state, strict=True: strictly(state, strict=False)


def unsaved_gain(model):
    for name, module in model.named_modules():
        if name.endswith("norm"):
            gain = module.weight.detach() * torch.rand(())
            del module.weight
            module.register_buffer("weight", gain, persistent=False)


def loads_rounded(model):
    def pre_hook(module, state, prefix, *args):
        for key in state:
            state[key] = state[key].bfloat16().float()

    model.register_load_state_dict_pre_hook(pre_hook)


class PackDefect(ReferenceSubject):
    def __init__(self, before=lambda c: c, after=lambda p: p, undo=lambda p: p):
        self.before, self.after, self.undo = before, after, undo

    def pack(self, codes):
        return self.after(super().pack(self.before(codes)))

    def unpack(self, packed, rows):
        return super().unpack(self.undo(packed), rows)


def swap_fields(packed):
    """Highest bits first instead of lowest: writer and reader agree, nobody else does."""
    return sum(((packed >> shift) & 3) << (6 - shift) for shift in (0, 2, 4, 6)).to(torch.uint8)


def zero_in_place(codes):
    return codes.add_(0) if codes.numel() < 9 else codes.mul_(-1).mul_(-1).clamp_(-1, 0)


DEFECTS = {
    "Q11_absmax_scale": ("weight_scale", WeightDefect(lambda w: w.abs().amax()), "scale_error"),
    "Q13_first_nonzero": ("weight_scale", WeightDefect(first_nonzero), "scale_error"),
    "Q15_chunk_means": ("weight_scale", WeightDefect(mean_of_chunk_means), "scale_error"),
    "Q10_scale_per_row": (
        "weight_scale",
        WeightDefect(lambda w: w.abs().mean(1, keepdim=True)),
        "scales_not_scalar",
    ),
    "Q14_stale_scale": ("weight_scale", RemembersScale(), "scale_error_after_update"),
    "Q20_writes_to_weight": ("weight_scale", WritesToWeight(), "scale_error"),
    "Q06_half_up_weights": ("weight_rounding", WeightDefect(rounding=half_up), "tie_errors"),
    "Q08_truncated_weights": ("weight_rounding", WeightDefect(rounding=torch.trunc), "_errors"),
    "Q12_sign": ("weight_rounding", WeightDefect(rounding=torch.sign), "_errors"),
    "Q02_per_tensor": (
        "activation_scale",
        ActivationDefect(lambda x: x.abs().amax().expand(*x.shape[:-1], 1)),
        "scale_error",
    ),
    "norm_over_the_batch": ("activation_scale", NormOverTheBatch(), "bytes.moved_by_mates"),
    "Q01_over_time": ("activation_scale", ScaleOverTime(), "scale_error"),
    "Q07_wraps": ("activation_range", ActivationDefect(steps=128.0), "sign_changes"),
    "Q08_truncated": ("activation_range", ActivationDefect(rounding=torch.trunc), "off_full_range"),
    "Q06_half_up": ("activation_range", ActivationDefect(rounding=half_up), "_errors"),
    "four_bits": ("activation_range", ActivationDefect(steps=7.0), "tokens_off_full_range"),
    "floor_on_scale": ("activation_range", FloorOnScale(), "tokens_off_full_range"),
    "Q04_no_floor": (
        "zero_and_tiny_rows",
        ActivationDefect(lambda x: x.abs().amax(-1, keepdim=True)),
        "bad_scales",
    ),
    "Q04_no_weight_floor": (
        "zero_and_tiny_rows",
        WeightDefect(lambda w: w.abs().mean()),
        "scale_of_zero_weight",
    ),
    "Q04_nan_of_zero_weight": (
        "zero_and_tiny_rows",
        LinearDefect(divides_by_weight),
        "non_finite_values",
    ),
    "floor_on_scale_tiny": ("zero_and_tiny_rows", FloorOnScale(), "rounding_error"),
    "flushes_small": ("zero_and_tiny_rows", LinearDefect(flushes_small), "homogeneity_error"),
    "K08_int16_accumulators": (
        "integer_path_exact",
        IntegerDefect(lambda a: a.to(torch.int16)),
        "accumulator_errors",
    ),
    "K14_bf16_accumulators": (
        "integer_path_exact",
        IntegerDefect(lambda a: a.bfloat16()),
        "accumulator_errors",
    ),
    "L07_bf16_reciprocal": ("fake_quant_agrees", LinearDefect(bf16_reciprocal), "training_forward"),
    "L05_no_activation_scale": (
        "fake_quant_agrees",
        LinearDefect(no_activation_scale),
        "training_forward_error",
    ),
    "L06_a16_inference": (
        "fake_quant_agrees",
        LinearDefect(a16_without_gradient),
        "inference_forward_error",
    ),
    "bias_inside_scale": ("bias_outside_scale", LinearDefect(bias_inside_scale), "bias_error"),
    "Q06_half_up_sign": (
        "sign_and_scale_relations",
        ActivationDefect(rounding=half_up),
        "code_errors",
    ),
    "sign_dependent_output": (
        "sign_and_scale_relations",
        LinearDefect(offset_by_sign),
        "output_errors",
    ),
    "Q13_scale_by_position": ("permutation_relations", WeightDefect(first_nonzero), "scale_change"),
    "feature_misread": ("permutation_relations", SwapsFeatures(), "accumulator_errors"),
    "one_scale_for_all_parts": ("fused_projection_scales", SharedScale(), "scale_error"),
    "L01_norm_removed": ("sub_norm_present", ModelDefect(drop_sub_norm), "scale_leak"),
    "L01_norm_bypassed": ("sub_norm_present", ModelDefect(bypass_sub_norm), "scale_leak"),
    "L10_batch_statistics": ("sub_norm_present", ModelDefect(batch_statistics), "rms_spread"),
    "L01_norm_bypassed_by_keys": ("sub_norm_present", KeysReadTheRawStream(), "bytes.bypassed"),
    "L01_missing_and_undeclared": (
        "sub_norm_present",
        NormMissingAndUndeclared(),
        "blocks.1.down, unlike blocks.0.down",
    ),
    "undeclared_parameters": ("parameter_budget", ModelDefect(extra_bias), "digits.parameters"),
    "frozen_parameters": ("parameter_budget", ModelDefect(frozen_layer), "digits.parameters"),
    "nothing_quantized_alphabet": ("ternary_alphabet", NothingQuantized(), "quantized is 0"),
    "nothing_quantized": ("quantized_modules", NothingQuantized(), "quantized is 0 modules"),
    "latent_in_evaluation": ("ternary_alphabet", LatentInEvaluation(), "digits.levels"),
    "Q10_row_scales": ("ternary_alphabet", ScalePerRow(), "digits.groups"),
    "Q19_layer_missed": (
        "quantized_modules",
        ModelDefect(one_layer_full_precision),
        "forward_error",
    ),
    "L06_a16_in_evaluation": (
        "quantized_modules",
        ModelDefect(a16_in_evaluation),
        "evaluation",
    ),
    "Q02_in_the_layer": (
        "quantized_modules",
        ModelDefect(per_tensor_activations),
        "forward_error",
    ),
    "Q18_head_quantized": (
        "quantized_modules",
        ModelDefect(quantized_head),
        "bytes.head.response",
    ),
    "undeclared_layer": ("quantized_modules", ModelDefect(undeclared_layer), "adapter"),
    "Q17_quantized_twice": ("quantized_modules", TwiceQuantized(), "effective_error"),
    "Q14_stale_effective": ("quantized_modules", StaleEffective(), "after the latent moved"),
    "L11_unmasked": ("causal_mask", ModelDefect(future_leak), "bytes.leak"),
    "L11_off_by_one": ("causal_mask", ModelDefect(off_by_one_mask), "bytes.leak"),
    "L11_at_block_ends": (
        "causal_mask",
        AttentionDefect(sees_the_next_key_at_block_ends),
        "bytes.leak",
    ),
    "L11_beyond_64_tokens": (
        "causal_mask",
        AttentionDefect(sees_the_next_key_beyond_64_tokens),
        "128 tokens, after position",
    ),
    "Q01_scale_sees_future": ("causal_mask", ScaleOverTime(), "bytes.leak"),
    "C16_untied": ("state_dict_round_trip", ModelDefect(untied), "head.weight.tied"),
    "C13_missing_key_swallowed": (
        "state_dict_round_trip",
        ModelDefect(lenient_load),
        "missing_keys_accepted",
    ),
    "C13_layers_swallow_missing_keys": (
        "state_dict_round_trip",
        LayersSwallowMissingKeys(),
        "bytes.missing_keys_accepted is 14 weights",
    ),
    "C08_gain_not_saved": ("state_dict_round_trip", ModelDefect(unsaved_gain), "digits.changed"),
    "C19_rounded_on_load": ("state_dict_round_trip", ModelDefect(loads_rounded), "digits.changed"),
    "P11_symmetric_order": (
        "bits_per_weight",
        PackDefect(after=swap_fields, undo=swap_fields),
        "wrong_bytes",
    ),
    "Q20_packs_in_place": ("bits_per_weight", PackDefect(before=zero_in_place), "lossy"),
    "one_byte_a_code": (
        "bits_per_weight",
        PackDefect(after=lambda p: p.to(torch.int16), undo=lambda p: p.to(torch.uint8)),
        "wrong_sizes",
    ),
}
"""Test id (with the number of the defect list) -> check, subject, what the reason must name."""


@pytest.mark.parametrize(("check", "subject", "reason"), DEFECTS.values(), ids=DEFECTS)
def test_defect_turns_the_check_red(run_check, check, subject, reason):
    result = run_check(f"architecture.{check}", subject)
    assert result.outcome is Outcome.FAIL, result.reason
    assert reason in result.reason


@pytest.mark.parametrize("check", CHECKS)
def test_reference_is_green(run_check, check):
    result = run_check(check, ReferenceSubject())
    assert result.outcome is Outcome.PASS, result.reason


def test_every_check_has_a_defect():
    assert {f"architecture.{check}" for check, _, _ in DEFECTS.values()} == set(CHECKS)


def foreign_subject():
    """A subject with a model and layers of its own, loaded as a user's file is."""
    path = Path(__file__).parents[1] / "subject" / "foreign_subject.py"
    spec = importlib.util.spec_from_file_location("foreign_subject", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Blobs()


SOUND = {
    "foreign": foreign_subject,
    "dropout": Dropout,
    "mapping": AnswersWithAMapping,
    "row": ScaleARow,
    "layer_norm": LayerNorms,
    "pre_norms": DeclaresPreNorms,
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
    if kind == "row" and check in ONE_SCALE:
        assert result.outcome is Outcome.NOT_MEASURED
        assert "one scale a row is declared" in result.reason
        return
    # The foreign subject has no causal model, no packing and no fused weight.
    rest = {Outcome.NOT_MEASURED, Outcome.NOT_APPLICABLE} if kind == "foreign" else set()
    assert result.outcome in {Outcome.PASS, *rest}, result.reason


def test_declaring_rows_hides_nothing(run_check):
    run = run_check("architecture.weight_scale", SaysRowsAndHasOne())
    assert run.outcome is Outcome.PASS, run.reason
    undeclared = run_check("architecture.weight_scale", DEFECTS["Q10_scale_per_row"][1])
    assert undeclared.outcome is Outcome.FAIL
