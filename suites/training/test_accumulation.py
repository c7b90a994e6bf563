"""Gradients summed over micro-batches, in whole and partial windows of an epoch."""

import pytest

from forge_harness import oracles
from forge_harness.errors import several

from .against_autograd import against_autograd, limit_of
from .support import cheapest, only_cheapest, others, train_size

_RECOGNISABLE = 0.8
"""Share of samples that must be told from others, for half of it to show another order: of 22 in
another order one or two are."""
_SMALL_NORM = 1e-2
"""Clip norm far below that of any gradient here: the reference's first one has 3.5."""


@pytest.mark.forge_check("training.accumulation_equivalence")
def test_accumulation_equivalence(subject, evidence):
    """Accumulated micro-batches give the gradient, and report the loss, of the whole batch.

    Oracle: one autograd pass over the samples the step says it used. 22 samples in 1, 4 and 5
    micro-batches, so that they differ in size, over two steps, so that left-over gradients show.
    Tolerance: two fp32 sums in different order (`oracles.mean_gradient_limit`); accumulating in
    bf16 is ten times, a mean of unequal means a thousand times larger. A pass that computes in half
    precision (an autocast of the loss, or of the session around it, which the oracle is then under
    as well) has four times what the same gradient is off by when summed over four parts. Once under
    a clip norm far below the gradient's: it clips the whole sum once, not each micro-batch (1.1).
    Where the model has dropout, both sides keep every element; where samples are augmented at
    random, the oracle has the inputs that the session's model was given, and these are more like
    the samples reported than like others. Where the loss couples the samples of a batch in training
    mode alone (batch normalisation, balance of experts), the whole is that of the session's own
    micro-batches; steps of a warmup in full precision are held to that model. Every task but the
    cheapest: one step of four.
    """
    task = cheapest(subject)
    for accumulation in (1, 4, 5):
        _expect_whole(
            *(subject, evidence, task, "", f"_{accumulation}"),
            **{"steps": 2, "batch_size": 22, "accumulation": accumulation},
        )
    found = against_autograd(
        subject, task, steps=2, batch_size=22, accumulation=4, clip_norm=_SMALL_NORM
    )
    evidence.at_most(
        "clipped_difference",
        found.gradient,
        limit=limit_of(subject, task, 22) + found.coarseness,
        reason=f"relative L2 to the whole gradient clipped to {_SMALL_NORM}, 4 micro-batches",
    )
    for other in others(subject):
        _expect_whole(
            *(subject, evidence, other, f"{other}.", ""),
            **{"steps": 1, "batch_size": 6, "accumulation": 4},
        )


def _expect_whole(subject, evidence, task, prefix, suffix, **options):
    """Holds gradient and loss of a few steps to those of whole batches."""
    found = against_autograd(subject, task, **options)
    limit = limit_of(subject, task, options["batch_size"]) + found.coarseness
    evidence.at_most(
        f"{prefix}gradient_difference{suffix}",
        found.gradient,
        limit=limit,
        reason=f"relative L2 over {several(options['steps'], 'step')} of "
        + several(options["accumulation"], "micro-batch", "micro-batches")
        + found.notes,
    )
    evidence.at_most(
        f"{prefix}loss_difference{suffix}",
        found.loss,
        limit=limit,
        reason="reported loss against the mean over the samples reported",
    )
    _expect_own(evidence, f"{prefix}own_samples{suffix}", found)


def _expect_own(evidence, name, found):
    """Holds inputs that a session's model had to the samples that the step reports."""
    if found.recognised is None:
        return
    share, another = found.recognised
    if another < _RECOGNISABLE:
        evidence.record(
            name,
            share,
            reason=f"not held: {another:.0%} of another read of the samples are most like their "
            "own; what is drawn of a sample does not show which it is",
        )
        return
    evidence.at_least(
        name,
        share,
        limit=_RECOGNISABLE / 2,
        reason="inputs of the session's model that are most like the sample which the step "
        f"reports, among those of the step; {another:.0%} of another read",
    )


@pytest.mark.forge_check("training.partial_window")
def test_partial_window(subject, evidence):
    """The last window of an epoch is normalised by the samples it has.

    Oracle: as for accumulation. The batch is three samples short of the epoch, in four
    micro-batches: the second step has three samples and one micro-batch stays empty. A subject
    that fills the window from the next epoch, or drops it, is held to the samples it reports; one
    that drops it begins an epoch with each full window.
    """
    task = only_cheapest(subject, evidence)
    size = train_size(subject, task)
    if size > 20_000:
        pytest.skip(f"an epoch of {size} samples is too long for one step")
    found = against_autograd(subject, task, steps=3, batch_size=size - 3, accumulation=4)
    limit = oracles.mean_gradient_limit(size) + found.coarseness
    windows = [len(record.sample_ids) for record in found.records]
    evidence.record("windows", str(windows), unit="samples", reason="samples of each step")
    evidence.at_most(
        "gradient_difference",
        found.gradient,
        limit=limit,
        reason=f"largest relative L2 over the windows{found.notes}",
    )
    evidence.at_most(
        "loss_difference",
        found.loss,
        limit=limit,
        reason="reported loss against the mean over the samples reported",
    )
    _expect_own(evidence, "own_samples", found)
    evidence.equal(
        "repeated_samples",
        _repeated(found.records[0].sample_ids, found.records[1].sample_ids, size),
        expected=0,
        unit="samples",
        reason="no sample comes twice within an epoch",
    )


def _repeated(first, second, size):
    """Samples that come twice within an epoch of `size`, told from its first two windows.

    A step may report its samples in any order. A second window as full as the first was filled from
    the next epoch, or is the first of it: the reading with fewer repetitions counts.
    """
    left = size - len(first)
    new = len(set(second) - set(first))
    once, again = (len(window) - len(set(window)) for window in (first, second))
    if len(second) < len(first):
        return once + len(second) - new
    filled = max(0, left - new) + max(0, again - left)
    return once + min(filled, again)
