"""The two arms that are compared: ternary sessions and full-precision ones."""

from __future__ import annotations

from collections.abc import Sequence

from forge_harness.protocols import StepRecord, TrainingSession

FIRST_STEPS = 3
"""Steps that tell two arms apart: with an output layer of zeros the losses of the first are equal,
and with a warmup from zero those of the second too."""


def first_steps(session: TrainingSession) -> list[StepRecord]:
    """Makes the first steps of a session and returns what they report."""
    return [session.step() for _ in range(FIRST_STEPS)]


def losses_of(steps: Sequence[StepRecord]) -> list[float]:
    """Returns the loss of each step."""
    return [step.loss for step in steps]


def one_arm(ternary: Sequence[float], full: Sequence[float]) -> str:
    """Returns why two arms cannot be compared; empty when they can.

    Args:
        ternary: Losses of ternary sessions.
        full: Those of full-precision sessions, same seeds and steps.
    """
    if list(ternary) != list(full):
        return ""
    return (
        "the subject's full-precision session is its ternary one: their losses are equal, bit for "
        "bit; train without quantization where TrainOptions.precision is 'full'"
    )


def samples_of(steps: Sequence[StepRecord]) -> int:
    """Returns how many samples steps got through."""
    return sum(len(step.sample_ids) for step in steps)


def uneven(ternary: Sequence[StepRecord], full: Sequence[StepRecord]) -> str:
    """Returns why what a step costs cannot be compared; empty when it can.

    Args:
        ternary: Steps of a ternary session.
        full: As many of a full-precision one.
    """
    counts = samples_of(ternary), samples_of(full)
    if counts == (0, 0):
        return (
            "no step names its samples (StepRecord.sample_ids), so whether both sessions do the "
            "same work cannot be told; name them"
        )
    if counts[0] == counts[1]:
        return ""
    return (
        f"the samples of {len(ternary)} steps (StepRecord.sample_ids) are {counts[0]} in the "
        f"ternary session and {counts[1]} in the full-precision one; give both the same batch"
    )
