"""The weight quantizer against float64, over shapes, layouts, magnitudes and exact ties."""

import pytest
import torch

from forge_harness import oracles
from forge_harness.oracles import vectors

from .bf16 import bf16_results, record_bf16
from .support import (
    Count,
    Worst,
    code_errors,
    expect_none,
    layouts,
    need_one_scale_a_weight,
    relative,
    tensor,
)


@pytest.mark.forge_check("architecture.weight_scale")
def test_weight_scale(subject, evidence):
    """The scale is one number, max(mean |w|, 1e-5), recomputed at every call.

    Oracle: float64 mean. Tolerance: 1e-6 relative, the rounding of a blocked fp32 sum
    (`oracles.SCALE_RTOL`). Inputs: 19 odd shapes, rows and columns of unequal magnitude, a large
    last chunk, a zero first weight, outliers; each contiguous, transposed and strided; and in bf16,
    for a quantizer that takes it and answers in fp32.
    """
    need_one_scale_a_weight(subject)
    error, entries, touched = Worst(), Count(), Count()
    for name, array in vectors.weights():
        expected = oracles.ternary(array).scale
        for layout, weight in layouts(tensor(array)):
            case = f"{name}, {layout}"
            before = weight.clone()
            _, scale = subject.quantize_weight(weight)
            error.see(case, relative(scale, expected))
            entries.see(case, torch.as_tensor(scale).numel() != 1)
            touched.see(case, not torch.equal(weight, before))
    expect_none(evidence, "scales_not_scalar", entries, "weights", "one scale a weight")
    evidence.at_most(
        "scale_error",
        error.value,
        limit=oracles.SCALE_RTOL,
        reason=error.text("relative to the float64 absolute mean"),
    )
    expect_none(
        evidence,
        "inputs_changed",
        touched,
        "weights",
        "the latent weight is read only",
    )
    evidence.at_most(
        "scale_error_after_update",
        _error_after_update(subject),
        limit=oracles.SCALE_RTOL,
        reason="a weight changed in place is quantized anew, not with a remembered scale",
    )
    record_bf16(evidence, _in_bf16(subject), "scale")


def _in_bf16(subject):
    return bf16_results(
        subject.quantize_weight, vectors.weights(), oracles.ternary, oracles.TERNARY_MARGIN
    )


def _error_after_update(subject):
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 96 * 33).reshape(96, 33))
    subject.quantize_weight(weight)
    with torch.no_grad():
        weight.mul_(3.0).add_(0.25)
    _, scale = subject.quantize_weight(weight)
    return relative(scale, oracles.ternary(weight).scale)


@pytest.mark.forge_check("architecture.weight_rounding")
def test_weight_rounding(subject, evidence):
    """Codes are clamp(round(w / scale), -1, 1), exact halves to even: |w| = scale / 2 is code 0.

    Oracle: tie vectors whose scale is exactly a power of two, and float64 codes wherever float64
    is more than 1e-6 away from the threshold (`oracles.TERNARY_MARGIN`). Codes are exact, those of
    bf16 weights too, where the quantizer takes them and answers in fp32.
    """
    need_one_scale_a_weight(subject)
    ties = Count()
    for name, array, expected in vectors.weights_on_thresholds():
        codes, _ = subject.quantize_weight(tensor(array))
        ties.see(name, int((codes.long() != torch.tensor(expected)).sum()))
    expect_none(evidence, "tie_errors", ties, "codes", "half to even")
    wrong, dtypes, repeats = Count(), Count(), Count()
    for name, array in vectors.weights():
        expected = oracles.ternary(array)
        for layout, weight in layouts(tensor(array)):
            case = f"{name}, {layout}"
            codes, _ = subject.quantize_weight(weight)
            again, _ = subject.quantize_weight(weight)
            limit = oracles.TERNARY_MARGIN
            wrong.see(case, code_errors(codes, expected.codes, expected.margin, limit))
            dtypes.see(case, codes.dtype != torch.int8)
            repeats.see(case, not torch.equal(codes, again))
    expect_none(evidence, "code_errors", wrong, "codes", "against float64")
    expect_none(evidence, "wrong_dtypes", dtypes, "weights", "codes are int8")
    expect_none(evidence, "unequal_repeats", repeats, "weights", "the same weight, the same codes")
    record_bf16(evidence, _in_bf16(subject), "codes")


@pytest.mark.forge_check("architecture.fused_projection_scales")
def test_fused_projection_scales(subject, evidence):
    """Each part of a fused weight is quantized as if it stood alone.

    Oracle: float64 on the parts, whose magnitudes differ by up to 1e4 and whose sizes differ; one
    shared scale would code the small parts as all zero. Tolerance as for `weight_scale`.
    """
    error, wrong, shapes = Worst(), Count(), Count()
    for sizes in ((16, 16, 16), (64, 8, 8), (1, 7, 130), (5,)):
        for magnitudes in ((1.0, 1.0, 1.0), (1.0, 100.0, 0.01), (0.05, 0.02, 3.0)):
            case = f"parts {sizes}, magnitudes {magnitudes}"
            weight = _stacked(sizes, magnitudes)
            expected = oracles.ternary_parts(weight, sizes)
            codes, scales = subject.quantize_weight_parts(weight, sizes)
            shapes.see(case, tuple(scales.shape) != (len(sizes),))
            if tuple(scales.shape) != (len(sizes),):
                continue
            error.see(case, relative(scales, [part.scale for part in expected]))
            for piece, part in zip(codes.split(list(sizes)), expected, strict=True):
                limit = oracles.TERNARY_MARGIN
                wrong.see(case, code_errors(piece, part.codes, part.margin, limit))
    expect_none(evidence, "wrong_scale_counts", shapes, "weights", "as many scales as parts")
    evidence.at_most(
        "scale_error",
        error.value,
        limit=oracles.SCALE_RTOL,
        reason=error.text("relative to the float64 absolute mean of the part"),
    )
    expect_none(evidence, "code_errors", wrong, "codes", "against float64")


def _stacked(sizes, magnitudes):
    generator = torch.Generator().manual_seed(5)
    return torch.cat(
        [
            torch.randn(size, 65, generator=generator) * magnitude
            for size, magnitude in zip(sizes, magnitudes, strict=False)
        ]
    )
