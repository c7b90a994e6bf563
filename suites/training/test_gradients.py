"""Gradients: the straight-through estimator elementwise, and their sum over micro-batches."""

import math

import numpy as np
import pytest
import torch

from forge_harness import oracles
from forge_harness.oracles import vectors
from forge_harness.subject.protocols import TrainOptions

from .support import (
    Watch,
    cheapest,
    gradient_difference,
    independent_gradients,
    shown,
    tasks,
    train_size,
)


def _cases():
    """Yields (name, x, weight, bias, upstream gradient), all deterministic.

    Upstream gradients differ in every entry (a kernel that reads the first one only is right for
    losses that are means), and come transposed, sliced and expanded.
    """
    generator = torch.Generator().manual_seed(47)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    for rows, columns in ((1, 1), (7, 13), (33, 65), (130, 128)):
        x, weight = randn(6, columns), randn(rows, columns)
        yield f"{rows}x{columns}", x, weight, randn(rows), randn(6, rows)
        yield f"{rows}x{columns} transposed", x, weight, randn(rows), randn(rows, 6).t()
        sliced = randn(12, 2 * rows)[::2, 1::2]
        yield f"{rows}x{columns} sliced", x, weight, randn(rows), sliced
        yield f"{rows}x{columns} expanded", x, weight, randn(rows), randn(1, rows).expand(6, rows)
    x, weight = randn(2, 5, 33), randn(9, 33)
    yield "three dimensions", x, weight, randn(9), randn(2, 5, 9)
    # Latents far beyond the scale: a clipped estimator drops their gradient.
    outliers = torch.where(torch.arange(33) % 5 == 0, 30.0, 1.0) * weight
    yield "beyond the clip point", x, outliers, randn(9), randn(2, 5, 9)
    # Just under half a code step: the forward sees 0 there, so the weight gradient is 0 as well;
    # with the raw activation it is not.
    steps = torch.full((4, 33), 0.49)
    steps[:, 0] = 127.0
    yield "inputs that quantize to zero", steps, weight, randn(9), randn(4, 9)
    yield "zero rows", x * (torch.arange(5) % 2)[:, None], weight, randn(9), randn(2, 5, 9)
    magnitudes = x * torch.logspace(-3, 3, 5)[:, None]
    yield "unequal magnitudes", magnitudes, weight, randn(9), randn(2, 5, 9)
    yield (
        "weight ties",
        randn(3, 4),
        torch.from_numpy(vectors.WEIGHT_TIES.copy()),
        randn(1),
        randn(3, 1),
    )


def _gradients(subject, x, weight, bias, upstream):
    leaves = [part.clone().requires_grad_() for part in (x, weight, bias)]
    y = subject.linear(*leaves)
    return torch.autograd.grad(y, leaves, upstream, allow_unused=True)


def _excess(found, expected, terms, length):
    """Error over its limit; infinite when there is no gradient at all."""
    if found is None:
        return math.inf
    limit = oracles.gradient_limit(length) * terms + 1e-37
    return float(np.max(np.abs(oracles.float64(found) - expected) / limit))


@pytest.mark.forge_check("training.ste_input_gradient")
def test_ste_input_gradient(subject, evidence):
    """DX = G . (C * beta) elementwise: identity through rounding, clamp and scale.

    Oracle: float64 with the subject's codes. Tolerance: `oracles.gradient_limit` of the sum of
    |terms|, 3 roundings a term and a random walk over the sum. A second backward pass gives the
    same, and the upstream gradient is left as it was.
    """
    worst, case_of, touched = 0.0, "none", []
    for name, x, weight, bias, upstream in _cases():
        codes, scale = subject.quantize_weight(weight)
        kept = upstream.clone()
        first, *_ = _gradients(subject, x, weight, bias, upstream)
        if not torch.equal(upstream, kept):
            touched.append(name)
        expected = oracles.input_gradient(kept, codes, scale)
        terms = oracles.input_gradient(kept.abs(), codes.abs(), scale)
        excess = _excess(first, expected, terms, codes.shape[0])
        if not excess <= worst:
            worst, case_of = excess, name
    evidence.equal(
        "upstream_changed",
        len(touched),
        expected=0,
        unit="cases",
        reason=f"others read the same upstream gradient; changed in {shown(touched)}",
    )
    evidence.at_most(
        "error",
        worst,
        limit=1.0,
        reason=f"largest error over its fp32 limit; worst case: {case_of}",
    )


@pytest.mark.forge_check("training.ste_weight_gradient")
def test_ste_weight_gradient(subject, evidence):
    """DW = G^T . (q * s) elementwise, with no mask beyond the scale; db = sum of G.

    Oracle and tolerance as for the input gradient. Against the *quantized* activations: inputs of
    0.49 code steps must leave no gradient at all. The scale passes no gradient: it would add one
    value to every element.
    """
    worst, case_of, bias_worst = 0.0, "none", 0.0
    for name, x, weight, bias, upstream in _cases():
        q, s = subject.quantize_activation(x)
        _, grad, grad_bias = _gradients(subject, x, weight, bias, upstream)
        tokens = upstream.numel() // upstream.shape[-1]
        expected = oracles.weight_gradient(upstream, q, s)
        terms = oracles.weight_gradient(upstream.abs(), oracles.int64(q).__abs__(), s)
        excess = _excess(grad, expected, terms, tokens)
        if not excess <= worst:
            worst, case_of = excess, name
        sums = oracles.bias_gradient(upstream), oracles.bias_gradient(upstream.abs())
        bias_worst = max(bias_worst, _excess(grad_bias, *sums, tokens))
    evidence.at_most(
        "error",
        worst,
        limit=1.0,
        reason=f"largest error over its fp32 limit; worst case: {case_of}",
    )
    evidence.at_most(
        "bias_error", bias_worst, limit=1.0, reason="largest error of db over its fp32 limit"
    )


@pytest.mark.forge_check("training.gradient_reaches_all")
def test_gradient_reaches_all(subject, evidence):
    """At every step every trainable parameter has a finite gradient that is not zero.

    Oracle: definition, read from the live gradients just before the optimizer uses them. A lost
    estimator leaves quantized layers at zero while norms and embeddings learn and the loss falls.
    """
    for task, count in zip(tasks(subject), (6, *[2] * 100), strict=False):
        session = subject.session(task, TrainOptions(steps=count))
        trainable = [n for n, p in session.model.named_parameters() if p.requires_grad]
        with Watch(session) as watch:
            for _ in range(count):
                session.step()
        evidence.equal(
            f"{task}.optimizer_steps",
            len(watch.updates),
            expected=count,
            unit="steps",
            reason="one optimizer step a session step",
        )
        dead = sorted(
            {name for u in watch.updates for name in trainable if not _alive(u.gradients[name])}
        )
        evidence.equal(
            f"{task}.parameters_without_gradient",
            len(dead),
            expected=0,
            unit="parameters",
            reason=f"of {len(trainable)} parameters over {count} steps: {shown(dead)}",
        )


def _alive(gradient):
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())


@pytest.mark.forge_check("training.accumulation_equivalence")
def test_accumulation_equivalence(subject, evidence):
    """Accumulated micro-batches give the gradient, and report the loss, of the whole batch.

    Oracle: one autograd pass over the samples the step says it used. 22 samples in 1, 4 and 5
    micro-batches, so that they differ in size, over two steps, so that left-over gradients show.
    Tolerance: two fp32 sums in different order (`oracles.mean_gradient_limit`); accumulating in
    bf16 is ten times, a mean of unequal means a thousand times larger.
    """
    task = cheapest(subject)
    for accumulation in (1, 4, 5):
        _, difference, loss_difference = _against_autograd(
            subject, task, steps=2, batch_size=22, accumulation=accumulation
        )
        evidence.at_most(
            f"gradient_difference_{accumulation}",
            difference,
            limit=oracles.mean_gradient_limit(22),
            reason=f"relative L2 over two steps, {accumulation} micro-batches a step",
        )
        evidence.at_most(
            f"loss_difference_{accumulation}",
            loss_difference,
            limit=oracles.mean_gradient_limit(22),
            reason="reported loss against the mean over the samples reported",
        )


@pytest.mark.forge_check("training.partial_window")
def test_partial_window(subject, evidence):
    """The last window of an epoch is normalised by the samples it has.

    Oracle: as for accumulation. The batch is three samples short of the epoch, in four
    micro-batches: the second step has three samples and one micro-batch stays empty. A subject
    that fills the window from the next epoch, or drops it, is held to the samples it reports.
    """
    task = cheapest(subject)
    size = train_size(subject, task)
    if size > 20_000:
        pytest.skip(f"an epoch of {size} samples is too long for one step")
    records, difference, loss_difference = _against_autograd(
        subject, task, steps=3, batch_size=size - 3, accumulation=4
    )
    windows = [len(record.sample_ids) for record in records]
    evidence.record("windows", str(windows), unit="samples", reason="samples of each step")
    evidence.at_most(
        "gradient_difference",
        difference,
        limit=oracles.mean_gradient_limit(size),
        reason="largest relative L2 over the windows",
    )
    evidence.at_most(
        "loss_difference",
        loss_difference,
        limit=oracles.mean_gradient_limit(size),
        reason="reported loss against the mean over the samples reported",
    )
    seen = [index for record in records[:2] for index in record.sample_ids][:size]
    evidence.equal(
        "repeated_samples",
        len(seen) - len(set(seen)),
        expected=0,
        unit="samples",
        reason="no sample comes twice within an epoch",
    )


def _against_autograd(subject, task, *, steps, batch_size, accumulation):
    """Records, and the largest gradient and loss difference of a few steps to plain autograd."""
    # A limit no gradient reaches: clipping has a check of its own.
    options = TrainOptions(
        steps=steps, batch_size=batch_size, accumulation=accumulation, clip_norm=1e9
    )
    session = subject.session(task, options)
    records, difference, loss_difference = [], 0.0, 0.0
    with Watch(session) as watch:
        for _ in range(steps):
            state = {key: value.clone() for key, value in session.model.state_dict().items()}
            record = session.step()
            loss, wanted = independent_gradients(subject, task, state, record.sample_ids)
            off = gradient_difference(watch.updates[-1].gradients, wanted)
            difference = max(difference, off)
            loss_difference = max(loss_difference, abs(record.loss - loss) / abs(loss))
            records.append(record)
    return records, difference, loss_difference
