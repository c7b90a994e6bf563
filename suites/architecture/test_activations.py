"""The activation quantizer against float64: one scale a token, the whole code range, the floor."""

import math

import numpy as np
import pytest
import torch

from forge_harness import oracles
from forge_harness.oracles import vectors
from forge_harness.probes.scales import quantized_weight
from forge_harness.protocols import Batch, BuildsModel

from .bf16 import bf16_results, record_bf16
from .calls import observe
from .support import (
    RESPONSE,
    Count,
    Worst,
    built,
    code_errors,
    error_over_l1,
    expect_none,
    need_one_scale_a_weight,
    relative,
    tensor,
)


@pytest.mark.forge_check("architecture.activation_scale")
def test_activation_scale(subject, evidence):
    """The scale of a token is max |x| / 127 over its features, whoever shares its batch.

    Oracle: float64 (2 roundings, under `oracles.SCALE_RTOL`), and a metamorphic relation: a token
    alone and among mates a million times larger, or zero, has the same codes and scale bit for bit.
    Of a model in evaluation mode, where one is built: a sample among copies of itself and among
    others, in a batch of one shape, has the same output (1e-6 of the largest, as in `causal_mask`);
    where outputs are of pairs of samples, as those of contrastive models, so have two samples.
    Tokens in bf16 have the scale of the same numbers in fp32, where the quantizer answers in fp32.
    """
    error, shapes, changed = Worst(), Count(), Count()
    for name, array in vectors.activations():
        x = tensor(array)
        _, scale = subject.quantize_activation(x)
        changed.see(name, int((x != tensor(array)).sum()))
        shapes.see(name, tuple(scale.shape) != (*x.shape[:-1], 1))
        if scale.shape == (*x.shape[:-1], 1):
            error.see(name, relative(scale, oracles.int8_tokens(array).scale))
    expect_none(evidence, "wrong_scale_shapes", shapes, "inputs", "scales are (..., 1)")
    expect_none(evidence, "inputs_changed", changed, "values", "the caller's tensor is its own")
    evidence.at_most(
        "scale_error",
        error.value,
        limit=oracles.SCALE_RTOL,
        reason=error.text("relative to float64 max |x| / 127"),
    )
    moved = _influence_of_mates(subject)
    expect_none(
        evidence,
        "tokens_moved_by_mates",
        moved,
        "tokens",
        "tokens are independent",
    )
    if isinstance(subject, BuildsModel):
        for task in subject.tasks():
            _samples_are_independent(subject, task, evidence)
    record_bf16(evidence, _in_bf16(subject), "scale")


def _in_bf16(subject):
    return bf16_results(
        subject.quantize_activation, vectors.activations(), oracles.int8_tokens, oracles.INT8_MARGIN
    )


def _samples_are_independent(subject, task, evidence):
    part = built(subject, task, batch_size=4)
    part.model.eval()
    inputs, targets = part.batch.inputs, part.batch.targets
    among = observe(subject, part.model, part.batch)
    twice = subject.example_batch(task, batch_size=2 * len(inputs), seed=1)
    shape, places = _places_of_samples(among, observe(subject, part.model, twice), len(inputs))
    # Where outputs are of pairs, two samples stay: one and itself may be alike whatever it is.
    kept = len(places)
    copies = inputs[[*range(kept), *[0] * (len(inputs) - kept)]]
    alone = observe(subject, part.model, Batch(inputs=copies, targets=targets))
    moved = ((among - alone).abs() / among.abs().max()).reshape(shape)
    own, others = moved, moved.narrow(places[0], kept, len(inputs) - kept)
    for place in places:
        own = own.narrow(place, 0, kept)
    evidence.at_most(
        f"{task}.moved_by_mates",
        float(own.max()),
        limit=1e-6,
        reason="relative change of a sample's outputs among others instead of copies of itself",
    )
    evidence.at_least(
        f"{task}.mates_differ",
        float(others.max()),
        limit=RESPONSE,
        reason="relative change of the others' outputs; otherwise nothing was tested",
    )


def _places_of_samples(output, twice, rows):
    """The shape to see outputs in, and the dimensions of it that are as long as the batch.

    Two of them, where outputs are of pairs of samples. Those of all tokens together are taken
    sample by sample.
    """
    sizes = zip(output.shape, twice.shape, strict=False)
    places = [place for place, size in enumerate(sizes) if size == (rows, 2 * rows)]
    if places:
        return output.shape, places[:2]
    if output.dim() and output.shape[0] % rows == 0:
        return (rows, -1), [0]
    pytest.skip(
        f"which outputs are those of which sample does not show: {tuple(output.shape)} of a batch "
        f"of {rows}; return one row a sample, or a token"
    )


def _influence_of_mates(subject):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 5, 33, generator=generator)
    moved = Count()
    for kind, factor in (("large", 1e6), ("zero", 0.0), ("small", 1e-3)):
        for b, t in ((0, 0), (1, 2), (2, 4)):
            mates = x * factor
            mates[b, t] = x[b, t]
            in_batch = [part[b, t] for part in subject.quantize_activation(mates)]
            alone = [part[0, 0] for part in subject.quantize_activation(x[b, t][None, None])]
            same = all(torch.equal(a, b) for a, b in zip(in_batch, alone, strict=True))
            moved.see(f"{kind} mates of token ({b}, {t})", not same)
    return moved


@pytest.mark.forge_check("architecture.activation_range")
def test_activation_range(subject, evidence):
    """Every token above the floor uses the code range up to 127, at its largest feature, unwrapped.

    Oracle: float64 codes wherever float64 is not within 3e-5 codes of a tie
    (`oracles.INT8_MARGIN`), exact ties half to even, and |x - scale * code| at most half a step.
    Inputs: magnitudes 2e-5 to 1e6, extremes of both signs, constant rows of 1e-4, odd widths; the
    same in bf16, where the quantizer answers in fp32.
    """
    peak, sign, wrong, far = Count(), Count(), Count(), Worst()
    for name, array in vectors.activations():
        expected = oracles.int8_tokens(array)
        codes, scale = subject.quantize_activation(tensor(array))
        q = oracles.int64(codes)
        peak.see(name, int(np.count_nonzero(np.abs(q).max(axis=-1) != 127)))
        sign.see(name, int(np.count_nonzero(q * np.sign(array) < 0)))
        limit = oracles.INT8_MARGIN
        wrong.see(name, code_errors(codes, expected.codes, expected.margin, limit))
        steps = np.abs(oracles.float64(array) / oracles.float64(scale) - q)
        far.see(name, float(steps.max()))
    expect_none(evidence, "sign_changes", sign, "codes", "no code wraps")
    expect_none(evidence, "tokens_off_full_range", peak, "tokens", "the peak has code 127")
    expect_none(evidence, "code_errors", wrong, "codes", "against float64")
    evidence.at_most(
        "rounding_error",
        far.value,
        limit=0.5 + oracles.INT8_MARGIN,
        unit="codes",
        reason=far.text("a value is at most half a step from its code"),
    )
    ties, _ = subject.quantize_activation(tensor(vectors.ACTIVATION_TIES))
    evidence.equal(
        "tie_errors",
        int((ties.long() != torch.tensor(vectors.ACTIVATION_TIE_CODES)).sum()),
        expected=0,
        unit="codes",
        reason="with a scale of exactly 1, halves round to even",
    )
    record_bf16(evidence, _in_bf16(subject), "codes")


@pytest.mark.forge_check("architecture.zero_and_tiny_rows")
def test_zero_and_tiny_rows(subject, evidence):
    """Zero, denormal and tiny rows stay finite and harmless; what is not finite is not hidden.

    Oracle: definition. A zero row has codes 0 and output 0; below the floor of 1e-5 values keep an
    error of half a step; y(c x) = c y(x) for c = 1e-4, which a floor applied to the scale instead
    of the absmax breaks (a row of 1e-4 becomes 7.9e-6). A NaN or an infinity in a token or in the
    weight is refused, or reaches the outputs it has a part in and no other token's: a number made
    of one is taken for a result.
    """
    need_one_scale_a_weight(subject)
    rows = vectors.floor_rows()
    codes, scale = subject.quantize_activation(tensor(rows))
    values, q, s = oracles.float64(rows), oracles.int64(codes), oracles.float64(scale)
    bad = np.count_nonzero(~np.isfinite(s)) + np.count_nonzero(s <= 0)
    evidence.equal(
        "bad_scales", int(bad), expected=0, unit="rows", reason="scales are finite and positive"
    )
    evidence.equal(
        "codes_of_zero_row",
        int(np.count_nonzero(q[0])),
        expected=0,
        unit="codes",
        reason="a zero row has no nonzero code",
    )
    evidence.at_most(
        "rounding_error",
        float(np.max(np.abs(values / s - q))),
        limit=0.5 + oracles.INT8_MARGIN,
        unit="codes",
        reason="at most half a step below the floor too",
    )
    zero_weight = torch.zeros(3, rows.shape[1])
    evidence.within(
        "scale_of_zero_weight",
        float(quantized_weight(subject, zero_weight)[1].min()),
        low=1e-30,
        high=1.0,
        reason="a scale of zero divides 0 by 0 wherever values are made of it",
    )
    evidence.equal(
        "non_finite_values",
        _non_finite_values(subject, tensor(rows)),
        expected=0,
        unit="values",
        reason="outputs and gradients of zero, denormal and tiny rows and weights are finite",
    )
    hidden, spread = _non_finite_inputs(subject)
    expect_none(evidence, "hidden_non_finite", hidden, "outputs", "NaN and infinity are passed on")
    expect_none(evidence, "mates_made_non_finite", spread, "outputs", "other tokens are untouched")
    homogeneity = _homogeneity(subject)
    evidence.at_most(
        "homogeneity_error",
        homogeneity.value,
        limit=2 * oracles.LINEAR_RTOL_L1,
        reason=homogeneity.text("y(c x) / c against y(x), over L1"),
    )


def _non_finite_values(subject, rows):
    """Counts non-finite values, and outputs of zero rows or zero weights that are not zero."""
    weights = torch.linspace(-1, 1, 7 * rows.shape[1]).reshape(7, -1)
    found = 0
    for factor in (1.0, 0.0, 1e-7, 1e-38):
        x = rows.clone().requires_grad_()
        w = (weights * factor).requires_grad_()
        y = subject.linear(x, w)
        y.sum().backward()
        # A gradient that is not there is none of finite values.
        gradients = [torch.full_like(p, torch.nan) if p.grad is None else p.grad for p in (x, w)]
        found += sum(int((~torch.isfinite(part)).sum()) for part in (y, *gradients))
        found += int(y[0].count_nonzero())
        if factor == 0.0:
            found += int(y.count_nonzero())
    return found


def _non_finite_inputs(subject):
    """Counts outputs that hide a NaN or an infinity, and those of other tokens that show one."""
    generator = torch.Generator().manual_seed(13)
    x, weight = torch.randn(3, 48, generator=generator), torch.randn(9, 48, generator=generator)
    hidden, spread = Count(), Count()
    for bad in (math.nan, math.inf, -math.inf):
        token, row = x.clone(), weight.clone()
        token[1, 7] = row[4, 7] = bad
        y = _output(subject, token, weight)
        hidden.see(f"{bad} in a token", 0 if y is None else int(torch.isfinite(y[1]).sum()))
        spread.see(f"{bad} in a token", 0 if y is None else int((~torch.isfinite(y[::2])).sum()))
        y = _output(subject, x, row)
        hidden.see(f"{bad} in a weight", 0 if y is None else int(torch.isfinite(y[:, 4]).sum()))
    return hidden, spread


def _output(subject, x, weight):
    """The output of the training forward; None where it refuses, which hides nothing."""
    try:
        return subject.linear(x, weight).detach()
    except Exception:  # a subject refuses with what it likes; finite inputs are held above
        return None


def _homogeneity(subject):
    """Constant rows have codes +-127 at any magnitude: no code can flip between x and c x."""
    signs = torch.where(torch.arange(48) % 3 == 0, -1.0, 1.0).expand(4, 48)
    weight = torch.randn(9, 48, generator=torch.Generator().manual_seed(11))
    expected = oracles.float64(subject.linear(signs, weight).detach())
    parts = (*subject.quantize_activation(signs), *quantized_weight(subject, weight))
    l1 = oracles.l1(*parts)
    worst = Worst()
    for c in (1e-4, 1e-3, 1e3, 1e6):
        y = oracles.float64(subject.linear(signs * c, weight).detach())
        # c itself is rounded to fp32 in signs * c: one more unit, inside the doubled limit.
        worst.see(f"c = {c:g}", error_over_l1(y / c, expected, l1))
    return worst
