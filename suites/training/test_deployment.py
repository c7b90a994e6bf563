"""What is trained is what is shipped, and two ranks train what one would."""

import pytest

from forge_harness.subject.protocols import TrainOptions

from .support import cheapest, differing, digests, shown, steps


@pytest.mark.forge_check("training.eval_is_quantized")
def test_eval_is_quantized(subject, evidence, tmp_path):
    """The metric in the loop is the metric of the exported package, and measuring changes nothing.

    Oracle: the package, evaluated from its files alone, holds ternary codes and nothing else to
    fall back to. Equal to the last bit: both read the same codes. Evaluating leaves state and
    training mode of every module as they were, and does not depend on gradient accumulation.
    """
    task = cheapest(subject)
    session = subject.session(task, TrainOptions(steps=12))
    steps(session, 8)
    state = digests(session.state_tensors())
    modes = {name: module.training for name, module in session.model.named_modules()}
    inside = dict(session.evaluate())
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
    subject.export_package(session, tmp_path / "package")
    outside = subject.evaluate_package(task, tmp_path / "package")
    for metric, unit in (("accuracy", "1"), ("loss", "nats")):
        evidence.equal(
            metric,
            inside[metric],
            expected=outside[metric],
            unit=unit,
            reason="in the loop against the package on the same validation split",
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
