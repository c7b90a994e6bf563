"""Learning rate and weight decay as pure functions of the optimizer step.

Nothing is stepped and nothing is stored, so a resumed run cannot be off by one.
"""

from __future__ import annotations

import math

from forge_harness.errors import ConfigError, unknown_choice
from forge_harness.protocols import ScheduleSpec, ScheduleStep

KINDS = ("two_stage", "cosine")


def schedule_at(spec: ScheduleSpec, step: int) -> ScheduleStep:
    """Returns what a step trains with, by the formulas of `ScheduleSpec`.

    Args:
        spec: The declared schedule.
        step: 0-based optimizer step, below `spec.total_steps`.
    """
    if step < spec.warmup_steps:
        rate = spec.peak * (step + 1) / spec.warmup_steps
        return ScheduleStep(learning_rate=rate, weight_decay=spec.weight_decay)
    return _two_stage(spec, step) if spec.kind == "two_stage" else _cosine(spec, step)


def schedule_steps(spec: ScheduleSpec) -> list[ScheduleStep]:
    """Returns the schedule of every step."""
    return [schedule_at(spec, step) for step in range(spec.total_steps)]


def check_schedule(spec: ScheduleSpec) -> None:
    """Refuses a schedule that cannot be followed.

    Raises:
        ConfigError: The kind is unknown or a value is out of its range.
    """
    if spec.kind not in KINDS:
        raise ConfigError(unknown_choice("schedule", spec.kind, KINDS), key="schedule")
    if not 0 <= spec.warmup_steps < spec.total_steps:
        raise ConfigError(
            f"warmup_steps {spec.warmup_steps} must be at least 0 and below the {spec.total_steps} "
            "steps of the run; shorten the warmup or train longer.",
            key="warmup_steps",
        )
    ranges = {
        "peak": (spec.peak, 0.0, 1e3),
        "weight_decay": (spec.weight_decay, 0.0, 1e3),
        "boundary": (spec.boundary, 0.0, 1.0),
        "final_fraction": (spec.final_fraction, 0.0, 1.0),
    }
    for key, (value, low, high) in ranges.items():
        # Written so that NaN is refused too.
        if not low <= value <= high:
            raise ConfigError(f"{key} {value!r} must be from {low:g} to {high:g}.", key=key)


def _two_stage(spec: ScheduleSpec, step: int) -> ScheduleStep:
    done = step / spec.total_steps
    if done < spec.boundary:
        rate = spec.peak * (1 - done / 2)
        return ScheduleStep(learning_rate=rate, weight_decay=spec.weight_decay)
    return ScheduleStep(learning_rate=spec.peak * (1 - done), weight_decay=0.0)


def _cosine(spec: ScheduleSpec, step: int) -> ScheduleStep:
    span = max(1, spec.total_steps - 1 - spec.warmup_steps)
    done = (step - spec.warmup_steps) / span
    fall = (1 + math.cos(math.pi * done)) / 2
    rate = spec.peak * (spec.final_fraction + (1 - spec.final_fraction) * fall)
    return ScheduleStep(learning_rate=rate, weight_decay=spec.weight_decay)
