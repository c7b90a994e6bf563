"""A few samples learned by heart: which, and at which rate the full-precision twin learns them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from forge_harness.subject.protocols import LoadsData, TrainOptions

from .support import counted, steps

STEPS = 60
SAMPLES = 16
"""As many images, or of text two samples: sixteen of 48 tokens each take hundreds of steps."""
LEARNED_BY_HEART = 0.05
"""Share of the first loss that may be left."""
MULTIPLES = (1, 3, 10, 30)
"""Of the recipe's rate, which is made for runs of more than 60 steps."""


def samples_of_targets(subject: Any, task: str) -> tuple[int, ...]:
    """Returns the first samples: as many as have sixteen targets, and two at least."""
    if not isinstance(subject, LoadsData):
        return tuple(range(SAMPLES))
    ids = range(min(SAMPLES, subject.data_info(task).train_size))
    targets = subject.batch(task, "train", ids).targets
    each = int(counted(subject, task, targets).sum()) / len(ids)
    return tuple(ids[: max(2, math.ceil(SAMPLES / max(1.0, each)))])


def is_learned(losses: Sequence[float]) -> bool:
    """Whether hardly anything is left of the first loss."""
    return losses[-1] / losses[0] <= LEARNED_BY_HEART


def sufficient_rate(subject: Any, task: str, options: TrainOptions, least: float) -> int:
    """Returns the multiple of the recipe's rate at which the twin learns the samples.

    1 where it does so at the recipe's own, or at none: then data or both arms may be broken.
    """
    twin = replace(options, precision="full")
    for multiple in MULTIPLES:
        if is_learned(losses_at(subject, task, twin, multiple, least)):
            return multiple
    return 1


def losses_at(
    subject: Any, task: str, options: TrainOptions, multiple: int, least: float
) -> list[float]:
    """Returns the losses of a session at a multiple of its rate, above the least there is."""
    if multiple > 1:
        peak = subject.schedule_spec(task, options).peak
        options = replace(options, learning_rate=multiple * peak)
    try:
        return [r.loss - least for r in steps(subject.session(task, options), options.steps)]
    except Exception:
        # A session that diverges raises what it likes; at this rate it learns nothing.
        return [1.0, math.inf]
