"""What is trained is what is shipped, and two ranks train what one would."""

import math
import statistics

import pytest

from forge_harness.subject.protocols import TrainOptions

from .support import cheapest, differing, digests, shown, steps


@pytest.mark.forge_check("training.eval_is_quantized")
def test_eval_is_quantized(subject, evidence, tmp_path):
    """The metric in the loop is the metric of the exported package, and measuring changes nothing.

    Oracle: the package, evaluated from its files alone, holds ternary codes and nothing else to
    fall back to. Medians over three seeds: bit-equal where both sides multiply integers; for a
    dequantized forward 1e-8, or up to 6e-6 in a run where rounding flips an activation code.
    Unquantized activations or one scale a batch make it 2e-4 (smallest of 12 runs: 4e-5), so the
    limit is 3e-5. Evaluating leaves state and training mode of every module as they were, and
    does not depend on gradient accumulation.
    """
    task = cheapest(subject)
    differences = [_package_difference(subject, task, seed, tmp_path) for seed in range(3)]
    for index, (metric, limit) in enumerate((("loss", 3e-5), ("accuracy", 2e-4))):
        values = [difference[index] for difference in differences]
        evidence.at_most(
            f"{metric}_difference",
            statistics.median(values),
            limit=limit,
            reason="in the loop against the package, same validation split; median of three seeds",
            samples=[value for value in values if math.isfinite(value)],
        )
    session = subject.session(task, TrainOptions(steps=12))
    steps(session, 8)
    state = digests(session.state_tensors())
    modes = {name: module.training for name, module in session.model.named_modules()}
    session.evaluate()
    changed = differing(state, digests(session.state_tensors()))
    evidence.equal(
        "changed_by_evaluating",
        len(changed),
        expected=0,
        unit="tensors",
        reason=f"evaluating only reads: {shown(changed)}",
    )
    flipped = [n for n, m in session.model.named_modules() if m.training != modes[n]]
    evidence.equal(
        "modes_left_changed",
        len(flipped),
        expected=0,
        unit="modules",
        reason=f"training mode after evaluating as before: {shown(flipped)}",
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


def _package_difference(subject, task, seed, directory):
    """Relative difference of the loss and difference of the accuracy, loop against package."""
    session = subject.session(task, TrainOptions(steps=12, seed=seed))
    steps(session, 8)
    inside = session.evaluate()
    path = directory / f"package-{seed}"
    subject.export_package(session, path)
    outside = subject.evaluate_package(task, path)
    loss = abs(inside["loss"] - outside["loss"]) / abs(outside["loss"])
    return loss, abs(inside["accuracy"] - outside["accuracy"])


@pytest.mark.forge_check("training.distributed_equivalence")
def test_distributed_equivalence(subject, evidence):
    """Two ranks end with the weights of one process that accumulates the same two micro-batches.

    Oracle: bitwise equality after three steps. Not against one large batch: its other summation
    order differs by 1e-7, which quantization amplifies to 3e-3 within eight steps.
    """
    task = cheapest(subject)
    options = TrainOptions(steps=3, batch_size=15, accumulation=2, seed=2)
    session = subject.session(task, options)
    start = digests(session.model.state_dict())
    steps(session, 3)
    alone = digests(session.model.state_dict())
    together = digests(subject.train_distributed(task, options, ranks=2))
    evidence.at_least(
        "tensors_trained",
        len(differing(start, alone)),
        limit=1,
        unit="tensors",
        reason="three steps move the weights; otherwise nothing was tested",
    )
    changed = differing(alone, together)
    evidence.equal(
        "different_tensors",
        len(changed),
        expected=0,
        unit="tensors",
        reason=f"sha256 of each tensor of the state dict: {shown(changed)}",
    )
