"""Steps of a session held to plain autograd over the samples that they report."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from forge_harness import oracles
from forge_harness.evidence import largest
from forge_harness.subject.protocols import TrainOptions

from .dropout import comparable, one_loss
from .precision import Passes
from .states import copied_state
from .support import (
    AsBuilt,
    Watch,
    counted,
    full_precision_steps,
    gradient_difference,
    norm,
)

COUPLED = (
    "; the loss couples the samples of a batch in training mode (batch normalisation, balance of "
    "experts): the whole is that of the session's own micro-batches, weighted by their targets"
)
DRAWN = "; samples are drawn anew with each read: inputs are those the session's model had"
OTHERS = (
    "; the session's model had inputs that LoadsData.batch does not give of the samples reported: "
    "what a session does to inputs (augmentation) belongs in batch, for the train split"
)
CARRIED = (
    "; the first step agrees and a later one does not: gradients are left over from the step "
    "before, or what a session carries from batch to batch (hidden states) is no buffer of its "
    "model, and begins anew where the model's state is loaded"
)
UNQUANTIZED = (
    "; the step is that of full precision: a session that begins so says for how many steps by "
    "full_precision_steps"
)


@dataclass(frozen=True, slots=True)
class Held:
    """A few steps against plain autograd: the largest differences, and what rounding explains."""

    records: list[Any]
    gradient: float
    loss: float
    coarseness: float
    recognised: tuple[float, float] | None
    """Of samples that are drawn anew: how many show which they are, and how many of a read do."""
    notes: str
    """What the oracle had where it is not the samples as one batch, and what explains that a step
    is off, for a reason."""


def limit_of(subject: Any, task: str, samples: int) -> float:
    """Returns the limit of a mean over the targets of samples, of which one of text has many."""
    targets = subject.batch(task, "train", range(samples)).targets
    terms = int(counted(subject, task, targets).sum())
    return oracles.mean_gradient_limit(terms)


def against_autograd(
    subject: Any,
    task: str,
    *,
    steps: int,
    batch_size: int,
    accumulation: int,
    clip_norm: float = 1e9,
) -> Held:
    """Holds a few steps to plain autograd. The default limit is one no gradient reaches.

    Steps that the session trains in full precision before quantization begins are held to the model
    of a full-precision session.
    """
    options = TrainOptions(
        steps=steps, batch_size=batch_size, accumulation=accumulation, clip_norm=clip_norm
    )
    session = subject.session(task, options)
    unquantized = full_precision_steps(session)
    if unquantized >= steps:
        pytest.skip(
            f"full_precision_steps of the session is {unquantized}, and the run has {steps} steps: "
            "none is ternary; have fewer of them in a shorter run (TrainOptions.steps)"
        )
    built = AsBuilt(subject, task, session)
    records, shares, notes = [], [], set()
    difference = loss_difference = coarseness = 0.0
    agreed = True
    with (
        comparable(one_loss(subject, task)),
        Watch(built) as watch,
        Passes(subject, task, session) as passes,
    ):
        for step in range(steps):
            state = copied_state(built.trained_model)
            record = passes.step()
            if passes.problem:
                pytest.skip(passes.problem)
            if passes.inputs is not None:
                shares.append(passes.recognised)
                notes.add(DRAWN)
            made = _Step(passes, state, record, watch.updates[-1].gradients, clip_norm)
            with passes.in_full_precision(options) if step < unquantized else nullcontext():
                found = made.differences()
            if passes.problem:
                pytest.skip(passes.problem)
            if passes.coupled:
                notes.add(COUPLED)
            if found.gradient > found.limit:
                carried = CARRIED if step and agreed else ""
                notes.add(made.why_off(options, step >= unquantized) or carried)
                agreed = False
            coarseness = largest((coarseness, found.coarseness))
            difference = largest((difference, found.gradient))
            loss_difference = largest((loss_difference, found.loss))
            records.append(record)
    worst = min(shares, default=None)
    return Held(records, difference, loss_difference, coarseness, worst, "".join(sorted(notes)))


@dataclass(frozen=True, slots=True)
class _Differences:
    gradient: float
    loss: float
    coarseness: float
    limit: float


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of a session, from the state before it."""

    passes: Passes
    state: Mapping[str, Any]
    record: Any
    gradients: Mapping[str, Tensor | None]
    clip_norm: float

    def differences(self) -> _Differences:
        """Returns how far it is off the passes as they are made now."""
        ids = self.record.sample_ids
        whole = self.passes.gradients(self.state, ids)
        coarseness = self.passes.coarseness(self.state, ids, whole[1])
        limit = oracles.mean_gradient_limit(len(ids)) + coarseness
        gradient, loss = self._off(*whole)
        if not (gradient <= limit and loss <= limit):
            gradient, loss = self._off(*self.passes.wanted(self.state, ids, whole, limit))
        return _Differences(gradient, loss, coarseness, limit)

    def why_off(self, options: TrainOptions, quantized: bool) -> str:
        """Returns the note on a step that is off, or "" where none is known to explain it."""
        if self.passes.others:
            return OTHERS
        if not quantized:
            return ""
        with self.passes.in_full_precision(options):
            twin = self.differences()
        return UNQUANTIZED if twin.gradient <= twin.limit else ""

    def _off(self, loss: float, wanted: Mapping[str, Tensor]) -> tuple[float, float]:
        factor = min(1.0, self.clip_norm / norm(wanted))
        clipped = {name: gradient * factor for name, gradient in wanted.items()}
        off = gradient_difference(self.gradients, clipped)
        return off, abs(self.record.loss - loss) / abs(loss)
