"""What is trained is what is shipped, and two ranks train what one would."""

import math
import statistics
from dataclasses import replace
from functools import partial
from urllib.parse import quote

import pytest
import torch

from forge_harness.errors import several
from forge_harness.subject.protocols import TrainOptions

from .averages import hold_averages
from .comparison import compare
from .dropout import WithoutDropout
from .outputs import choices
from .rerun import outcome
from .support import (
    before_update,
    cheapest,
    counted,
    differing,
    digests,
    norm,
    only_cheapest,
    others,
    short_epochs,
    shown,
    steps,
    trained_model,
)

SAMPLES = 32
"""Validation samples read at a time: logits of 128 tokens and 256 classes are 4 MB."""
EQUAL = {"loss": 3e-5, "accuracy": 2e-4}
"""Largest difference of two evaluations of one model, relative for the loss (see below)."""


@pytest.mark.forge_check("training.eval_is_quantized")
def test_eval_is_quantized(subject, evidence, tmp_path):
    """The metric in the loop is that of the whole validation split and of the exported package.

    Oracles: the package of every task, evaluated from its files alone: it holds ternary codes and
    nothing else to fall back to. And the split itself, every sample once through the subject's loss
    in evaluation mode, weighted by its targets. Bit-equal where both sides multiply integers; for a
    dequantized forward 1e-8, or up to 6e-6 in a run where rounding flips an activation code.
    Unquantized activations or one scale a batch make it 2e-4 (smallest of 12 runs: 4e-5), gains
    left out of a package 2e-4, a mean of batch means 3e-3, the train split 1e-2, a lost batch 2e-2:
    the limit is 3e-5. Summing the split in other batches costs 3e-8 (fp32 means, measured). Medians
    over three seeds for the cheapest task, one seed for the others. Each of these models was looked
    at in evaluation mode five steps before: the cheapest by `evaluate`, the others by one batch.
    Evaluating leaves the state as it was, and so does exporting; in the step after it every module
    is in the mode of the step before.
    The metric does not depend on gradient accumulation. A run with an evaluation in it goes on as
    one without, bit for bit, where two runs without one agree. An export into the place of an older
    one is refused, or is the newer model. Averaged weights (`trained_model`) are averages of those
    that are trained: between the least and the largest of them in every element, and they move.
    """
    task = cheapest(subject)
    _expect_equal(
        evidence,
        "",
        [
            _evaluations(subject, task, seed, tmp_path, lambda session: session.evaluate())
            for seed in range(3)
        ],
    )
    hold_averages(evidence, subject, task)
    _expect_nothing_changed(subject, task, evidence)
    _expect_gone_on(subject, task, evidence)
    _expect_exported_anew(subject, task, evidence, tmp_path / "twice")
    for other in others(subject):
        look = partial(_evaluate_a_batch, subject, other)
        found = _evaluations(subject, other, 0, tmp_path, look)
        _expect_equal(evidence, f"{other}.", [found])


def _expect_nothing_changed(subject, task, evidence):
    session = subject.session(task, TrainOptions(steps=12))
    steps(session, 7)
    modes = _modes_of_a_step(session)
    state = digests(session.state_tensors())
    session.evaluate()
    changed = differing(state, digests(session.state_tensors()))
    evidence.equal(
        "changed_by_evaluating",
        len(changed),
        expected=0,
        unit="tensors",
        reason=f"evaluating only reads: {shown(changed)}",
    )
    after = _modes_of_a_step(session)
    flipped = [name for name, mode in modes.items() if after[name] != mode]
    evidence.equal(
        "modes_left_changed",
        len(flipped),
        expected=0,
        unit="modules",
        reason=f"training mode in the step after evaluating as before: {shown(flipped)}",
    )
    plain, accumulated = (
        subject.session(task, TrainOptions(steps=1, batch_size=16, accumulation=count)).evaluate()
        for count in (1, 4)
    )
    evidence.equal(
        "loss_with_accumulation",
        accumulated["loss"],
        expected=plain["loss"],
        unit="nats",
        reason="the same fresh weights; accumulation scales gradients, not the metric",
    )


def _modes_of_a_step(session):
    """The mode of each module as the optimizer steps: many trainers set it at each step anew."""
    modes = {}

    def look(_=None):
        modes.update((n, m.training) for n, m in trained_model(session).named_modules())

    handle = before_update(session, look)
    try:
        session.step()
    finally:
        handle.remove()
    if not modes:
        look()
    return modes


def _expect_gone_on(subject, task, evidence):
    """Holds a run with an evaluation in it to one without."""
    plain, evaluated = (_run(subject, task, evaluations) for evaluations in (0, 1))
    if plain != evaluated and plain != _run(subject, task, 0):
        evidence.record(
            "after_evaluating",
            "not compared: two runs of one seed differ",
            reason="what training.repeat_bit_identical holds; only then does a difference say that "
            "it comes of evaluating",
        )
        return
    compare(evidence, evaluated, plain, "after_evaluating.")


def _run(subject, task, evaluations):
    session = subject.session(task, TrainOptions(steps=12))
    records = steps(session, 3)
    for _ in range(evaluations):
        session.evaluate()
    return outcome(session, records + steps(session, 8))


def _expect_exported_anew(subject, task, evidence, path):
    session = subject.session(task, TrainOptions(steps=12))
    steps(session, 4)
    subject.export_package(session, path)
    steps(session, 8)
    try:
        subject.export_package(session, path)
    except Exception as error:  # whatever it refuses with
        refused = f"refused: {type(error).__name__}"
        evidence.record("exported_again", refused, reason="into the place of an older export")
        return
    loop, package = session.evaluate(), subject.evaluate_package(task, path)
    evidence.at_most(
        "loss_exported_again",
        _difference("loss", loop, package),
        limit=EQUAL["loss"],
        reason="in the loop against a package in the place of one of eight steps before",
    )


def _expect_equal(evidence, prefix, found):
    """Records how far the loop's metrics are from those of the package and of the split."""
    changed = sorted({name for run in found for name in run["changed"]})
    evidence.equal(
        f"{prefix}changed_by_exporting",
        len(changed),
        expected=0,
        unit="tensors",
        reason=f"exporting only reads the state: {shown(changed)}",
    )
    for other, name, reason in (
        ("package", "difference", "in the loop against the package, same validation split"),
        ("split", "off_the_split", "in the loop against every validation sample once"),
    ):
        for metric in sorted(found[0][other].keys() & EQUAL, reverse=True):
            values = [_difference(metric, run["loop"], run[other]) for run in found]
            evidence.at_most(
                f"{prefix}{metric}_{name}",
                # Of one that is no number no median tells.
                statistics.median(values) if all(map(math.isfinite, values)) else math.nan,
                limit=EQUAL[metric],
                reason=f"{reason}; median of {several(len(values), 'seed')}",
                samples=[value for value in values if math.isfinite(value)],
            )


def _difference(metric, one, two):
    scale = abs(two[metric]) if metric == "loss" else 1.0
    return abs(one[metric] - two[metric]) / scale


def _evaluations(subject, task, seed, directory, look):
    """Trains eight steps and evaluates in the loop, from the package and sample by sample.

    `look` has the session after three of them: what an evaluation keeps is old by the end. The
    package is written before the last evaluation, which would refresh it.
    """
    session = subject.session(task, TrainOptions(steps=12, seed=seed))
    steps(session, 3)
    look(session)
    steps(session, 5)
    path = directory / f"{quote(task, safe='')}-{seed}"
    state = digests(session.state_tensors())
    subject.export_package(session, path)
    return {
        "changed": differing(state, digests(session.state_tensors())),
        "loop": session.evaluate(),
        "package": subject.evaluate_package(task, path),
        # Last: it leaves the model in evaluation mode.
        "split": _whole_split(subject, session, task),
    }


@torch.no_grad()
def _evaluate_a_batch(subject, task, session):
    """One batch in evaluation mode: an evaluation of a large split costs seconds."""
    subject.loss(session.model.eval(), subject.batch(task, "validation", range(2)))
    session.model.train()


def _whole_split(subject, session, task):
    """Loss and accuracy over all validation samples; the model's own outputs say what it chose.

    Without one logit a class for each target there is no telling, and no accuracy.
    """
    info = subject.data_info(task)
    model = session.model.eval()
    outputs = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    loss = count = 0
    right = []
    try:
        with torch.no_grad():
            for start in range(0, info.validation_size, SAMPLES):
                ids = range(start, min(start + SAMPLES, info.validation_size))
                batch = subject.batch(task, "validation", ids)
                known = counted(subject, task, batch.targets).flatten()
                loss += float(subject.loss(model, batch)) * int(known.sum()) if known.any() else 0.0
                count += int(known.sum())
                chosen = [choices(output, info.cardinality) for output in outputs]
                outputs.clear()
                if sum(map(len, chosen)) == batch.targets.numel():
                    right.append((torch.cat(chosen) == batch.targets.flatten())[known])
    finally:
        handle.remove()
    metrics = {"loss": loss / count}
    if sum(map(len, right)) == count:
        metrics["accuracy"] = float(torch.cat(right).double().mean())
    return metrics


@pytest.mark.forge_check("training.distributed_equivalence")
def test_distributed_equivalence(subject, evidence):
    """Two ranks end with the weights of one process that accumulates the same two micro-batches.

    Oracle: bitwise equality after ten steps, which cross the border of an epoch where the data are
    small: there every rank needs the new order. Not against one large batch: its other summation
    order differs by 1e-7, which quantization amplifies to 3e-3 within eight steps. With dropout,
    ranks draw other masks: then both are held to the run without it (1.01 times as far; other draws
    of one process 0.95 to 1.03; each rank on its own half of the batch 1.85).
    """
    task = only_cheapest(subject, evidence)
    options = short_epochs(subject, task, steps=10, accumulation=2, seed=2)
    # Odd: the micro-batches are of unequal size.
    options = replace(options, batch_size=(options.batch_size or 15) | 1)
    session = subject.session(task, options)
    start = digests(session.model.state_dict())
    steps(session, options.steps)
    alone = session.model.state_dict()
    together = subject.train_distributed(task, options, ranks=2)
    evidence.at_least(
        "tensors_trained",
        len(differing(start, digests(alone))),
        limit=1,
        unit="tensors",
        reason="ten steps move the weights; otherwise nothing was tested",
    )
    with WithoutDropout():
        still = subject.session(task, options)
        steps(still, options.steps)
    drawn = _distance(alone, still.model.state_dict())
    if drawn:
        evidence.at_most(
            "distance_over_dropout",
            _distance(together, still.model.state_dict()) / drawn,
            limit=1.25,
            reason="distance to the run without dropout, over that of one process: ranks draw "
            "masks of their own",
        )
        return
    changed = differing(digests(alone), digests(together))
    evidence.equal(
        "different_tensors",
        len(changed),
        expected=0,
        unit="tensors",
        reason=f"sha256 of each tensor of the state dict: {shown(changed)}",
    )


def _distance(one, two):
    """L2 distance of two state dicts."""
    return norm({name: one[name].double() - two[name].double() for name in two})
