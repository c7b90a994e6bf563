"""The two arms that are compared: ternary sessions and full-precision ones."""

from __future__ import annotations

from collections.abc import Sequence

from forge_harness.protocols import TrainingSession

FIRST_STEPS = 3
"""Steps that tell two arms apart: with an output layer of zeros the losses of the first are equal,
and with a warmup from zero those of the second too."""


def first_losses(session: TrainingSession) -> list[float]:
    """Makes the first steps of a session and returns their losses."""
    return [session.step().loss for _ in range(FIRST_STEPS)]


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
