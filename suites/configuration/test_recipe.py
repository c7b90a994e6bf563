"""What the configuration says of training and quantization, held against what happens."""

import pytest

from forge_harness import oracles
from forge_harness.errors import ForgeError, several
from forge_harness.evidence import largest
from forge_harness.protocols import TrainOptions

STEPS = (1, 2, 7, 40, 301)
"""Run lengths: degenerate, odd, and one of the quick profile's size."""
ASKED_PEAK = 0.001234
"""No recipe's own learning rate."""
FLOAT64_STEPS = 64
"""Rounding of some tens of float64 operations, in units of 2**-52."""


def tasks_of(subject):
    """Returns the subject's task names, or one placeholder when it names none."""
    return list(subject.tasks()) if hasattr(subject, "tasks") else ["default"]


def _runs(subject, evidence, lengths):
    """Yields (task, options, spec) of the runs the subject does not refuse, and says which it does.

    A run that is shorter than a warmup of fixed length may be refused, in a sentence.
    """
    refused, taken = [], 0
    for task in tasks_of(subject):
        for total, asked in lengths:
            options = TrainOptions(seed=0, steps=total, learning_rate=asked)
            try:
                spec = subject.schedule_spec(task, options)
            except (ForgeError, ValueError) as error:
                refused.append(f"{task}, {several(total, 'step')}: {error}")
                continue
            taken += 1
            yield task, options, spec
    evidence.record(
        "runs_refused", len(refused), unit="runs", reason=refused[0] if refused else "none"
    )
    if refused and not taken:
        pytest.skip(f"the subject refuses every run of {STEPS} steps: {refused[0]}")


@pytest.mark.forge_check("configuration.schedule_golden")
def test_schedule_golden(subject, evidence):
    """Learning rate and weight decay of every step equal the declared formula.

    Oracle: `oracles.schedule`, written from the text of `ScheduleSpec`. Tolerance: 64 units of
    float64 rounding of the largest, so an off-by-one of a single step (1e-3 and more) cannot hide.
    Of a kind without a formula only lengths and peaks are held.
    """
    worst, steps, wrong_lengths, other_peaks, unknown = 0.0, 0, 0, [], set()
    lengths = [*((total, None) for total in STEPS), (40, ASKED_PEAK)]
    for task, options, spec in _runs(subject, evidence, lengths):
        planned = list(subject.planned_schedule(task, options))
        total, asked = options.steps, options.learning_rate
        wrong_lengths += len(planned) != total or spec.total_steps != total
        if asked is not None and spec.peak != asked:
            other_peaks.append(f"{task}: {spec.peak:.6g} instead of {asked:.6g}")
        if spec.kind not in oracles.KINDS:
            unknown.add(f"{task}: {spec.kind!r}")
            continue
        formula = oracles.schedule(spec)
        steps += min(len(planned), len(formula))
        worst = largest((worst, *_errors(planned, formula)))
    evidence.equal("plans_of_wrong_length", wrong_lengths, expected=0, reason="one entry a step")
    evidence.equal(
        "peaks_not_as_asked",
        len(other_peaks),
        expected=0,
        reason="; ".join(other_peaks) or "the learning rate of the options is the peak",
    )
    if steps or not unknown:
        evidence.at_least("steps_compared", steps, limit=1, unit="steps", reason="over all tasks")
        evidence.at_most(
            "relative_error",
            worst,
            limit=FLOAT64_STEPS * 2.0**-52,
            reason="float64 rounding of the formula, of its largest rate and decay",
        )
    if unknown:
        pytest.skip(
            f"no formula of the schedule of {', '.join(sorted(unknown))}; expected kind "
            f"{' or '.join(oracles.KINDS)}: hold the plan to its formula in a check of your own"
        )


def _errors(planned, formula):
    """Yields the error of each rate and decay, over the largest that the formula has.

    Not over its own: near its end a cosine to zero is a difference of two numbers near one, whose
    rounding depends on how it is written.
    """
    for name in oracles.Rates._fields:
        peak = largest((1e-12, *(abs(getattr(golden, name)) for golden in formula)))
        for found, golden in zip(planned, formula, strict=False):
            yield abs(getattr(found, name) - getattr(golden, name)) / peak


@pytest.mark.forge_check("configuration.warmup_within_run")
def test_warmup_within_run(subject, evidence):
    """Warmup ends within the run, and the peak it leads to is reached, for short runs too.

    A run too short for its warmup may be refused instead.
    """
    too_long, never = [], []
    for task, options, spec in _runs(subject, evidence, [(total, None) for total in STEPS]):
        total = options.steps
        # One step may be all of the warmup: `max(1, steps // 10)`, and is at the peak.
        if spec.warmup_steps >= max(total, 2):
            too_long.append(f"{task}: {spec.warmup_steps} of {total} steps")
        rates = [step.learning_rate for step in subject.planned_schedule(task, options)]
        # Two-stage schedules fall from the first step on: half the peak is what is left at the
        # boundary.
        peak = largest(rates)
        if not peak >= spec.peak / 2:
            never.append(f"{task}: {peak:.3g} of {spec.peak:.3g} in {total} steps")
    evidence.equal(
        "warmups_too_long",
        len(too_long),
        expected=0,
        reason="; ".join(too_long) + "; refuse shorter runs where it is of fixed length"
        if too_long
        else "all end",
    )
    evidence.equal(
        "peaks_never_reached", len(never), expected=0, reason="; ".join(never) or "all are reached"
    )
