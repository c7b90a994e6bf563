"""A few samples learned by heart: which, and at which rate the full-precision twin learns them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from forge_harness.subject.protocols import LoadsData, TrainOptions

from .support import counted, steps

STEPS = 60
MORE_STEPS = 240
"""Where full precision does not learn them in 60: a decoder of width 64 with the weights that
Hugging Face draws (standard deviation 0.02) has learned two samples after 90 of these, and not
after 60 at any rate."""
SAMPLES = 16
"""As many images, or of text two samples: sixteen of 48 tokens each take hundreds of steps."""
FIRST_SAMPLES = 64
"""Among which those are: of instructions that were cut off, no target may be left."""
LEARNED_BY_HEART = 0.05
"""Share of the first loss that may be left."""
LEARNED_ANEW = 0.2
"""As much, where a sample is another in each step. Full precision must reach 0.05; what does not
learn stays above a half."""
TAIL = 10
"""Last losses that are averaged there: one of them says which draw it was."""
MULTIPLES = (1, 3, 10, 30)
"""Of the recipe's rate, which is made for runs of more than 60 steps."""


def samples_of_targets(subject: Any, task: str) -> tuple[int, ...]:
    """Returns the first samples with targets: as many as have sixteen, and two at least."""
    if not isinstance(subject, LoadsData):
        return tuple(range(SAMPLES))
    first = range(min(FIRST_SAMPLES, subject.data_info(task).train_size))
    known = counted(subject, task, subject.batch(task, "train", first).targets)
    counts = known.reshape(len(first), -1).sum(1).tolist()
    ids = [index for index, count in zip(first, counts, strict=True) if count][:SAMPLES]
    each = sum(counts[index] for index in ids) / (len(ids) or 1)
    return tuple(ids[: max(2, math.ceil(SAMPLES / max(1.0, each)))])


def left(losses: Sequence[float], *, drawn: bool) -> float:
    """Returns the share of the first loss that is left; of the last ones, where samples vary."""
    return statistics.fmean(losses[-TAIL if drawn else -1 :]) / losses[0]


def is_learned(losses: Sequence[float], *, drawn: bool) -> bool:
    """Whether hardly anything is left of the first loss."""
    return left(losses, drawn=drawn) <= LEARNED_BY_HEART


@dataclass(frozen=True, slots=True)
class Learned:
    """A run that should learn them.

    Attributes:
        steps: Of the run.
        multiple: Its rate, over the recipe's.
        losses: Above the least there is.
        by_twin: Whether full precision learns them in as many steps.
    """

    steps: int
    multiple: int
    losses: list[float]
    by_twin: bool


def learned_at(
    subject: Any, task: str, options: TrainOptions, least: float, *, drawn: bool
) -> Learned:
    """Returns a run of steps and a rate that suffice.

    The lowest at which the twin learns the samples, or else the next: codes lag behind weights, so
    ternary training needs up to 1.4 times the rate. 1 where the twin learns them at none, in more
    steps neither: then data or both arms may be broken. Samples that are `drawn` anew in each step
    have more steps at once.
    """
    for count in (MORE_STEPS,) if drawn else (options.steps, MORE_STEPS):
        taken = replace(options, steps=count)
        if lowest := sufficient_rate(subject, task, taken, least, drawn=drawn):
            break
    rates = [m for m in MULTIPLES if lowest and m >= lowest][:2] or [1]
    for multiple in rates:
        losses = losses_at(subject, task, taken, multiple, least)
        if is_learned(losses, drawn=drawn):
            break
    return Learned(taken.steps, multiple, losses, bool(lowest))


def sufficient_rate(
    subject: Any, task: str, options: TrainOptions, least: float, *, drawn: bool
) -> int:
    """Returns the lowest multiple of the recipe's rate at which the twin learns; 0 for none."""
    twin = replace(options, precision="full")
    for multiple in MULTIPLES:
        if is_learned(losses_at(subject, task, twin, multiple, least), drawn=drawn):
            return multiple
    return 0


def losses_at(
    subject: Any, task: str, options: TrainOptions, multiple: int, least: float
) -> list[float]:
    """Returns the losses of a session at a multiple of its rate, above the least there is."""
    if multiple > 1:
        peak = subject.schedule_spec(task, options).peak
        options = replace(options, learning_rate=multiple * peak)
    session = subject.session(task, options)
    try:
        return [record.loss - least for record in steps(session, options.steps)]
    except Exception:
        # A step that diverges raises what it likes; at this rate it learns nothing.
        return [1.0, math.inf]
