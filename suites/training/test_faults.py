"""Values that are not finite, put into a training step from outside."""

import math

import pytest
import torch

from forge_harness.subject.protocols import TrainOptions

from .outputs import changed_tensors
from .states import on_gradient, tensors_of, with_values
from .support import (
    cheapest,
    differing,
    digests,
    models_of,
    optimizer_of,
    others,
    running_statistics,
    shown,
    states_of_models,
    steps,
    trained_model,
)


class Fault:
    """Something put into one step of a session, and whether it got there.

    Attributes:
        applied: How often it was put in.
    """

    def __init__(self, change, *, at):
        self.applied = 0
        self._change, self._at = change, at

    def inject(self, session):
        """Registers it; returns the handle that takes it out."""
        trainable = [p for p in trained_model(session).parameters() if p.requires_grad]
        if self._at == "largest gradient":
            return on_gradient(max(trainable, key=torch.Tensor.numel), self._on_gradient)
        if self._at == "smallest gradient":
            return on_gradient(min(trainable, key=torch.Tensor.numel), self._on_gradient)
        return trained_model(session).register_forward_hook(self._on_output)

    def _on_gradient(self, gradient):
        self.applied += 1
        return with_values(gradient, self._change)

    def _on_output(self, module, args, out):
        if self._at == "first output" and self.applied:
            return out
        changed, count = changed_tensors(out, self._change)
        self.applied += bool(count)
        return changed


def _nan_column(gradient):
    return gradient.index_fill(-1, torch.tensor([0], device=gradient.device), math.nan)


def _nan(value):
    return value * math.nan


def _inf(value):
    return value + math.inf


def _inf_with_gradients(value):
    """Infinite, as its gradients are: those of a loss plus infinity would be what they were."""
    return (value.abs() + 1) * math.inf


FAULTS = {
    "nan_in_one_gradient": (_nan_column, "largest gradient", 1),
    "inf_in_one_gradient": (_inf, "smallest gradient", 1),
    "nan_in_the_loss": (_nan, "output", 1),
    "inf_in_the_loss": (_inf_with_gradients, "output", 1),
    "nan_in_the_first_of_two_losses": (_nan, "first output", 2),
}
"""Name -> what is done to a tensor, where, micro-batches of the step."""


@pytest.mark.forge_check("training.non_finite_stops")
def test_non_finite_stops(subject, evidence):
    """A NaN or infinity stops the step, aloud, before it reaches weights or optimizer state.

    Faults injected: in one gradient, in the model's output, and in the output for the first of two
    micro-batches only, after two ordinary steps. A fault counts where it was put in: the hook saw a
    tensor. Oracle: weights and optimizer state are bit for bit those before the step, and what
    batch norms keep, which a forward pass moves, is finite; the step raised, or reported a
    non-finite loss or norm; with the fault gone the next step is finite, loss and norm, and changes
    weights. One fault for every task but the cheapest.
    """
    task = cheapest(subject)
    cases = [(task, name, name) for name in FAULTS]
    name = "nan_in_one_gradient"
    cases += [(other, name, f"{other}.{name}") for other in others(subject)]
    missing = [case[-1] for case in cases if not _expect_stopped(subject, evidence, *case)]
    if missing:
        pytest.skip(
            f"{len(missing)} of {len(cases)} faults could not be put in, as torch's hooks reached "
            f"no tensor of the step: {shown(missing)}; call model(...), not a method of it, and "
            "let autograd give the parameters their gradients"
        )


def _expect_stopped(subject, evidence, task, fault_name, prefix):
    """Puts one fault into the third step of a session, and looks at the fourth as well.

    Returns whether it could be put in.
    """
    change, place, accumulation = FAULTS[fault_name]
    session = subject.session(task, TrainOptions(steps=6, accumulation=accumulation))
    steps(session, 2)
    before = _weights_and_moments(session)
    fault = Fault(change, at=place)
    handle = fault.inject(session)
    loud = _is_loud(session)
    handle.remove()
    evidence.record(
        f"{prefix}.injected",
        fault.applied,
        unit="times",
        reason="torch's hooks reached a tensor of the step; otherwise nothing was tested",
    )
    if not fault.applied:
        return False
    changed = differing(before, _weights_and_moments(session))
    broken = _not_finite(session)
    evidence.equal(
        f"{prefix}.changed",
        len(set(changed) | set(broken)),
        expected=0,
        unit="tensors",
        reason="weights and optimizer state as before the step, and every running statistic "
        f"finite; changed: {shown(changed)}; not finite: {shown(broken)}",
    )
    evidence.equal(
        f"{prefix}.reported",
        loud,
        expected=True,
        reason="the step raises, or reports the non-finite loss or norm",
    )
    _expect_going_on(session, evidence, prefix)
    return True


def _expect_going_on(session, evidence, prefix):
    """Makes a step with the fault gone, which is one like any other."""
    before = _weights(session)
    try:
        record = session.step()
    except Exception as error:  # Whatever a trainer raises, it raises here without a cause.
        evidence.equal(
            f"{prefix}.raised_after",
            f"{type(error).__name__}: {error}",
            expected="",
            reason="the next step is one like any other: gradients of a stopped one are not left",
        )
        return
    evidence.record(
        f"{prefix}.loss_after", record.loss, unit="nats", reason="training goes on without it"
    )
    evidence.equal(
        f"{prefix}.finite_after",
        math.isfinite(record.loss) and math.isfinite(record.grad_norm),
        expected=True,
        reason=f"loss {record.loss:.4g} and norm {record.grad_norm:.4g} of the next step: nothing "
        "of the fault is left",
    )
    evidence.at_least(
        f"{prefix}.moved_after",
        len(differing(before, _weights(session))),
        limit=1,
        unit="tensors",
        reason="weights that the next step changes: training goes on",
    )


def _is_loud(session):
    try:
        record = session.step()
    except Exception:
        # Whatever a trainer raises; that the fault was put in is held apart from this.
        return True
    return not (math.isfinite(record.loss) and math.isfinite(record.grad_norm))


def _weights(session):
    return digests(dict(trained_model(session).named_parameters()))


def _weights_and_moments(session):
    """Digests of all that must stay: of states the statistics of batch norms are left out.

    A forward pass moves them before anything can be known of its gradients.
    """
    statistics = _statistics(session)
    state = {name: t for name, t in states_of_models(session).items() if name not in statistics}
    return digests(state | tensors_of(optimizer_of(session).state_dict()))


def _not_finite(session):
    state = states_of_models(session)
    return sorted(name for name in _statistics(session) if not state[name].isfinite().all())


def _statistics(session):
    """Names of the statistics of batch norms, as `states_of_models` has them."""
    return {
        f"{k}.{n}" for k, model in models_of(session).items() for n in running_statistics(model)
    }
