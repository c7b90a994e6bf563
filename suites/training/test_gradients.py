"""Gradients: the straight-through estimator elementwise, and what each of them reaches."""

import pytest
import torch

from forge_harness import oracles
from forge_harness.evidence import largest
from forge_harness.oracles import vectors
from forge_harness.probes.scales import quantized_weight
from forge_harness.subject.protocols import BuildsModel

from .alignment import align, ignored_share
from .excess import excess, is_worse
from .layers import layer_errors
from .reach import reached
from .support import shown, tasks

UNREAD = (
    "no target that was moved changed anything: a loss that reads none, as a contrastive one, is "
    "said by targets that are all the same; "
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


def _layers(subject, evidence):
    """Yields (task, errors) of the models' own layers, after saying what could not be compared."""
    if not isinstance(subject, BuildsModel):
        evidence.record("layers_compared", 0, unit="layers", reason="the subject builds no model")
        return
    for task in subject.tasks():
        errors = layer_errors(subject, task)
        evidence.record(
            f"{task}.layers_compared",
            errors.compared,
            unit="layers",
            reason="quantized modules of build_model whose gradients are held to the oracle; not "
            f"trained, and no gradient goes through them: {shown(errors.frozen)}",
        )
        evidence.equal(
            f"{task}.layers_unexplained",
            len(errors.unexplained),
            expected=0,
            unit="layers",
            level="warn",
            reason="not called with a token, or its output is no product of its matrix and the "
            "codes of its input or of a module inside it (what else it does to its input first is "
            f"to be shown by quantized_input): {shown(errors.unexplained)}",
        )
        yield task, errors


def _need_matrices(unheld):
    """Skips the rest of a check for layers whose gradients have no oracle: convolutions."""
    if unheld:
        pytest.skip(
            f"the gradients of {len(unheld)} modules whose weight is no matrix (N, K) have no "
            f"oracle here; those of linear and of the others were held: {shown(unheld)}"
        )


@pytest.mark.forge_check("training.ste_input_gradient")
def test_ste_input_gradient(subject, evidence):
    """DX = G . (C * beta) elementwise: identity through rounding, clamp and scale.

    Oracle: float64 with the subject's codes, for `linear` and for each quantized layer of
    `build_model`, with what one backward pass of the loss hands it. Tolerance:
    `oracles.gradient_limit` of the sum of |terms|, 3 roundings a term and a random walk over the
    sum (the reference's layers reach 0.09 of it, a mask on the largest input 5e4 times it). The
    upstream gradient is left as it was.
    """
    worst, case_of, touched = 0.0, "none", []
    for name, x, weight, bias, upstream in _cases():
        codes, scale = quantized_weight(subject, weight)
        kept = upstream.clone()
        first, *_ = _gradients(subject, x, weight, bias, upstream)
        if not torch.equal(upstream, kept):
            touched.append(name)
        column = scale[:, None]
        expected = oracles.input_gradient(kept, codes, column)
        terms = oracles.input_gradient(kept.abs(), codes.abs(), column)
        error = excess(first, expected, terms, codes.shape[0])
        if is_worse(error, worst):
            worst, case_of = error, name
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
    unheld = []
    for task, errors in _layers(subject, evidence):
        evidence.at_most(
            f"{task}.layer_error",
            errors.input_error,
            limit=1.0,
            reason=f"of the layers of build_model; worst layer: {errors.input_layer}",
        )
        unheld += [f"{task}.{name}" for name in errors.unheld]
    _need_matrices(unheld)


@pytest.mark.forge_check("training.ste_weight_gradient")
def test_ste_weight_gradient(subject, evidence):
    """DW = G^T . (q * s) elementwise, with no mask beyond the scale; db = sum of G.

    Oracle and tolerance as for the input gradient, at the layers of `build_model` too (reference
    0.21 of the limit; a clipped estimator, raw activations or a scale that leaks 1e5 times it).
    Against the *quantized* activations: inputs of 0.49 code steps must leave no gradient at all.
    The scale passes no gradient: it would add one value to every element. And it is the gradient of
    the forward pass that was made: what is computed again for the backward draws the same masks.
    """
    worst, case_of, bias_worst = 0.0, "none", 0.0
    for name, x, weight, bias, upstream in _cases():
        q, s = subject.quantize_activation(x)
        _, grad, grad_bias = _gradients(subject, x, weight, bias, upstream)
        tokens = upstream.numel() // upstream.shape[-1]
        expected = oracles.weight_gradient(upstream, q, s)
        terms = oracles.weight_gradient(upstream.abs(), oracles.int64(q).__abs__(), s)
        error = excess(grad, expected, terms, tokens)
        if is_worse(error, worst):
            worst, case_of = error, name
        sums = oracles.bias_gradient(upstream), oracles.bias_gradient(upstream.abs())
        bias_worst = largest((bias_worst, excess(grad_bias, *sums, tokens)))
    evidence.at_most(
        "error",
        worst,
        limit=1.0,
        reason=f"largest error over its fp32 limit; worst case: {case_of}",
    )
    evidence.at_most(
        "bias_error", bias_worst, limit=1.0, reason="largest error of db over its fp32 limit"
    )
    unheld = []
    for task, errors in _layers(subject, evidence):
        evidence.at_most(
            f"{task}.layer_error",
            errors.weight_error,
            limit=1.0,
            reason=f"of the layers of build_model; worst layer: {errors.weight_layer}",
        )
        draws = errors.draws
        evidence.equal(
            f"{task}.redrawn",
            draws.redrawn,
            expected=0,
            unit="draws",
            reason=f"random tensors of the recomputed forward that the forward never had; of "
            f"{draws.again} drawn again and {draws.forward} drawn: {draws.first}",
        )
        unheld += [f"{task}.{name}" for name in errors.unheld]
    _need_matrices(unheld)


@pytest.mark.forge_check("training.gradient_reaches_all")
def test_gradient_reaches_all(subject, evidence):
    """At every step every trainable parameter has a finite gradient that is not zero.

    Oracle: definition, read from the live gradients just before the optimizer uses them. A lost
    estimator leaves quantized layers at zero while norms and embeddings learn and the loss falls.
    Modules that a step does not call (layers skipped at random, experts without a token) and what
    is behind a factor of zeros may be left out: one of up to 40 steps must reach it. A target acts
    at its own output: metamorphic, one target replaced, the change of the loss's gradient elsewhere
    is at most a tenth of that in its place (0 for a mean over targets, 1/16 for one with class
    weights, infinite where labels are shifted twice). What is declared to be no target acts
    nowhere: the gradient at its output is zero.
    """
    for task, count in zip(tasks(subject), (6, *[2] * 100), strict=False):
        found = reached(subject, task, count)
        evidence.equal(
            f"{task}.optimizer_steps",
            found.optimizer_steps,
            expected=found.steps,
            unit="steps",
            reason="one optimizer step a session step",
        )
        evidence.equal(
            f"{task}.parameters_without_gradient",
            len(found.dead),
            expected=0,
            unit="parameters",
            reason=f"of {len(found.trainable)} parameters over {found.steps} steps: "
            f"{shown(found.dead)}; left out by some: {shown(found.left_out)}",
        )
    for task in subject.tasks() if isinstance(subject, BuildsModel) else ():
        alignment = align(subject, task)
        evidence.record(
            f"{task}.targets_moved",
            alignment.tried,
            unit="targets",
            reason="one at a time; none where no output has the targets' shape, or all are alike",
        )
        evidence.at_most(
            f"{task}.target_elsewhere",
            alignment.elsewhere,
            limit=0.1,
            reason="change of the loss's gradient elsewhere over that at the target's own output; "
            f"{UNREAD if alignment.tried and alignment.unread else ''}"
            f"worst: target {alignment.where}",
        )
        share = ignored_share(subject, task)
        if share is not None:
            evidence.at_most(
                f"{task}.ignored_gradient",
                share,
                limit=0.0,
                reason="largest gradient at the output of what is declared to be no target, over "
                "the largest at that of a target",
            )
