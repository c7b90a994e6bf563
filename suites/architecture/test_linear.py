"""The ternary linear layer: exact integers, the training forward, bias and metamorphic relations.

All expectations are made of the subject's own codes and scales, which `test_weights` and
`test_activations` judge: an error here is an error of the product, the rescaling or the bias.
"""

import numpy as np
import pytest
import torch

from forge_harness import oracles
from forge_harness.oracles import vectors
from forge_harness.probes.scales import quantized_weight

from .support import (
    Count,
    Worst,
    error_over_l1,
    expect_none,
    layouts,
    need_one_scale_a_weight,
    relative,
)


@pytest.mark.forge_check("architecture.integer_path_exact")
def test_integer_path_exact(subject, evidence):
    """The accumulators are the int64 product of the codes, bit for bit, and factor is s * beta.

    Oracle: int64. Integers are compared exactly; the factor within 4 units of fp32 roundoff
    (`oracles.RESCALE_RTOL`). Inputs: odd shapes, strided, and all codes 127 with K up to 40,000,
    which overflows int16 at 259 products, fp16 at 65,504 and bf16 integers at 256.
    """
    need_one_scale_a_weight(subject)
    wrong, dtypes, factors = Count(), Count(), Worst()
    for case, x, weight in _operands():
        q, s = subject.quantize_activation(x)
        codes, scale = quantized_weight(subject, weight)
        accumulators, factor = subject.integer_linear(x, weight)
        expected = oracles.integer_product(q, codes)
        wrong.see(case, int(np.count_nonzero(oracles.float64(accumulators) != expected)))
        dtypes.see(case, accumulators.dtype not in (torch.int32, torch.int64))
        factors.see(case, relative(factor, oracles.float64(s) * oracles.float64(scale)))
    expect_none(evidence, "accumulator_errors", wrong, "outputs", "equal to int64")
    expect_none(evidence, "float_accumulators", dtypes, "inputs", "accumulators are integers")
    evidence.at_most(
        "factor_error",
        factors.value,
        limit=oracles.RESCALE_RTOL,
        reason=factors.text("relative to activation scale times weight scale"),
    )


@pytest.mark.forge_check("architecture.fake_quant_agrees")
def test_fake_quant_agrees(subject, evidence):
    """The training forward equals the integer path up to fp32 rounding, with and without gradient.

    Oracle: float64 from the subject's codes. Tolerance: 8 u L1, rigorous for short sums and three
    times the largest error seen for long ones (`oracles.LINEAR_RTOL_L1`). A bf16 reciprocal, an
    unquantized operand or a missing rescale is 1e3 to 1e6 times larger.
    """
    need_one_scale_a_weight(subject)
    trained, inferred, integers = Worst(), Worst(), Worst()
    for case, x, weight in _operands(longest=1031):
        parts = (*subject.quantize_activation(x), *quantized_weight(subject, weight))
        expected, l1 = oracles.output(*parts), oracles.l1(*parts)
        y = subject.linear(x.clone().requires_grad_(), weight.clone().requires_grad_())
        trained.see(case, error_over_l1(y, expected, l1))
        with torch.no_grad():
            inferred.see(case, error_over_l1(subject.linear(x, weight), expected, l1))
        accumulators, factor = subject.integer_linear(x, weight)
        product = oracles.int64(accumulators) * oracles.float64(factor)
        integers.see(case, error_over_l1(y, product, l1))
    for name, worst, rounding in (
        ("training_forward_error", trained, 0.0),
        ("inference_forward_error", inferred, 0.0),
        ("against_integer_path", integers, oracles.RESCALE_RTOL),
    ):
        evidence.at_most(
            name,
            worst.value,
            limit=oracles.LINEAR_RTOL_L1 + rounding,
            reason=worst.text("over L1, the sum of |terms| of the output"),
        )


def _operands(longest=40_000):
    """Yields (case, x, weight): every odd shape in three layouts, 3-D input, long and extreme."""
    generator = torch.Generator().manual_seed(23)
    for rows, columns in vectors.ODD_SHAPES:
        x = torch.randn(5, columns, generator=generator) * torch.logspace(-2, 2, 5)[:, None]
        weight = torch.randn(rows, columns, generator=generator)
        yield f"{rows}x{columns}", x, weight
    weight = torch.randn(7, 65, generator=generator)
    x = torch.randn(6, 65, generator=generator)
    for layout, strided_weight in layouts(weight):
        for other, strided_x in layouts(x):
            yield f"{other} input, {layout} weight", strided_x, strided_weight
    yield "three dimensions", x.view(2, 3, 65), weight
    yield "one dimension", x[0], weight
    for length in (300, 1031, 4096, 40_000):
        if length <= longest:
            # Odd sums of the same sign: half of them are no multiple of two, so a format with too
            # few bits cannot hold them by luck.
            x = torch.full((3, length), 2.0)
            x[1, ::7] = 1.0
            x[2] = -2.0
            weight = torch.ones(3, length)
            weight[1] = -1.0
            yield f"all codes extreme, K = {length}", x, weight


@pytest.mark.forge_check("architecture.bias_outside_scale")
def test_bias_outside_scale(subject, evidence):
    """The bias is added after rescaling, in full precision.

    Oracle: linear(x, w, b) = linear(x, w) + b, biases from 1e-3 to 1e3 that are no multiple of any
    code step, 2-D and 3-D inputs; and a zero input gives exactly b. Tolerance: 8 u of L1 + |b|.
    """
    need_one_scale_a_weight(subject)
    generator = torch.Generator().manual_seed(29)
    bias = torch.logspace(-3, 3, 13) * torch.where(torch.arange(13) % 2 == 0, 1.0, -1.0)
    weight = torch.randn(13, 65, generator=generator)
    worst = Worst()
    for case, shape in (("2-D", (6, 65)), ("3-D", (2, 3, 65))):
        for magnitude in (1e-3, 1.0, 1e3):
            x = torch.randn(*shape, generator=generator) * magnitude
            parts = (*subject.quantize_activation(x), *quantized_weight(subject, weight))
            terms = oracles.l1(*parts) + np.abs(oracles.float64(bias))
            plain = oracles.float64(subject.linear(x, weight))
            y = subject.linear(x, weight, bias)
            expected = plain + oracles.float64(bias)
            worst.see(f"{case}, |x| about {magnitude:g}", error_over_l1(y, expected, terms))
    evidence.at_most(
        "bias_error",
        worst.value,
        limit=2 * oracles.LINEAR_RTOL_L1,
        reason=worst.text("both sides round once; over L1 + |b|"),
    )
    zero = subject.linear(torch.zeros(4, 65), weight, bias)
    evidence.equal(
        "outputs_of_zero_off_bias",
        int((zero != bias).sum()),
        expected=0,
        unit="outputs",
        reason="a zero input gives the bias itself",
    )


@pytest.mark.forge_check("architecture.sign_and_scale_relations")
def test_sign_and_scale_relations(subject, evidence):
    """Negation and powers of two go through quantization and product without a trace.

    Metamorphic: -w gives -C and -y; -x gives -q and -y; 2^k w and 2^k x give the same codes and
    2^k y. Exact in any binary floating-point arithmetic, so compared bit for bit. Inputs include
    exact ties, which rounding half up or half away treats by sign.
    """
    codes, outputs = Count(), Count()
    for case, x, weight in _relation_inputs():
        for relation, factor in (("-1", -1.0), ("2^-3", 0.125), ("2^4", 16.0)):
            sign = int(np.sign(factor))
            where = f"{case}, times {relation}"
            q, qf = (subject.quantize_activation(v)[0].long() for v in (x, x * factor))
            c, cf = (subject.quantize_weight(v)[0].long() for v in (weight, weight * factor))
            codes.see(where, int((qf != sign * q).sum()) + int((cf != sign * c).sum()))
            y = subject.linear(x, weight)
            moved = (subject.linear(x * factor, weight), subject.linear(x, weight * factor))
            outputs.see(where, sum(int((other != y * factor).sum()) for other in moved))
    expect_none(evidence, "code_errors", codes, "codes", "codes follow the sign only")
    expect_none(evidence, "output_errors", outputs, "outputs", "outputs follow exactly")


def _relation_inputs():
    generator = torch.Generator().manual_seed(31)
    for rows, columns in ((7, 13), (33, 128), (130, 65)):
        x = torch.randn(4, columns, generator=generator)
        yield f"{rows}x{columns}", x, torch.randn(rows, columns, generator=generator)
    ties = torch.from_numpy(vectors.ACTIVATION_TIES.copy())
    weight = torch.from_numpy(vectors.WEIGHT_TIES.copy()).repeat(3, 5)[:, : ties.shape[1] * 2]
    yield "exact ties", torch.cat([ties, -ties], dim=1), weight


@pytest.mark.forge_check("architecture.permutation_relations")
def test_permutation_relations(subject, evidence):
    """The order of inputs, outputs and tokens carries no meaning.

    Metamorphic: permuting the features of x and w together leaves the accumulators as they are;
    permuting weight rows or tokens permutes codes and accumulators. Exact on integers; the scale
    is a sum in another order, so within 1e-6 (`oracles.SCALE_RTOL`).
    """
    need_one_scale_a_weight(subject)
    generator = torch.Generator().manual_seed(37)
    wrong, scales = Count(), Worst()
    for rows, columns in ((7, 13), (33, 128), (130, 65)):
        x = torch.randn(6, columns, generator=generator)
        weight = torch.randn(rows, columns, generator=generator)
        weight *= torch.logspace(-2, 2, rows)[:, None]
        features = torch.randperm(columns, generator=generator)
        outputs = torch.randperm(rows, generator=generator)
        tokens = torch.randperm(6, generator=generator)
        y, _ = subject.integer_linear(x, weight)
        case = f"{rows}x{columns}"
        pairs = (
            ("features", x[:, features], weight[:, features], y),
            ("outputs", x, weight[outputs], y[:, outputs]),
            ("tokens", x[tokens], weight, y[tokens]),
        )
        for kind, moved_x, moved_weight, expected in pairs:
            accumulators, _ = subject.integer_linear(moved_x, moved_weight)
            wrong.see(f"{case}, {kind} permuted", int((accumulators != expected).sum()))
            pair = [subject.quantize_weight(w)[1] for w in (moved_weight, weight)]
            scales.see(f"{case}, {kind} permuted", relative(*pair))
    expect_none(evidence, "accumulator_errors", wrong, "outputs", "integers permute exactly")
    evidence.at_most(
        "scale_change",
        scales.value,
        limit=oracles.SCALE_RTOL,
        reason=scales.text("the same magnitudes have the same mean"),
    )
