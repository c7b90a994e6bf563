"""Declared learning-rate and weight-decay schedules, evaluated in float64."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

KINDS = ("cosine", "two_stage")
"""Kinds whose formula is stated."""


class Schedule(Protocol):
    """The fields of `ScheduleSpec`, whose docstring states the formulas."""

    @property
    def kind(self) -> str:
        """Name of the formula: one of `KINDS`, or another name where none is stated."""
        ...

    @property
    def peak(self) -> float:
        """Learning rate at the end of the warmup."""
        ...

    @property
    def warmup_steps(self) -> int:
        """W: steps of the linear rise."""
        ...

    @property
    def total_steps(self) -> int:
        """S: optimizer steps."""
        ...

    @property
    def weight_decay(self) -> float:
        """Weight decay before any boundary."""
        ...

    @property
    def boundary(self) -> float:
        """Share of the steps at which the second stage starts."""
        ...

    @property
    def final_fraction(self) -> float:
        """Learning rate of the last step of a cosine, over the peak."""
        ...


class Rates(NamedTuple):
    """Learning rate and weight decay of one step."""

    learning_rate: float
    weight_decay: float


def schedule(spec: Schedule) -> list[Rates]:
    """Returns the rates of each of the spec's steps.

    Raises:
        ValueError: The kind is not one whose formula is stated.
    """
    return [rates_at(spec, step) for step in range(spec.total_steps)]


def rates_at(spec: Schedule, step: int) -> Rates:
    """Returns the rates of the 0-based optimizer step `step`."""
    if spec.kind not in KINDS:
        raise ValueError(f"schedule kind {spec.kind!r}; expected 'cosine' or 'two_stage'.")
    if step < spec.warmup_steps:
        return Rates(spec.peak * (step + 1) / spec.warmup_steps, spec.weight_decay)
    if spec.kind == "two_stage":
        return _two_stage(spec, step / spec.total_steps)
    return Rates(spec.peak * _cosine(spec, step), spec.weight_decay)


def _two_stage(spec: Schedule, done: float) -> Rates:
    if done < spec.boundary:
        return Rates(spec.peak * (1 - done / 2), spec.weight_decay)
    return Rates(spec.peak * (1 - done), 0.0)


def _cosine(spec: Schedule, step: int) -> float:
    last = spec.total_steps - 1
    done = (step - spec.warmup_steps) / max(1, last - spec.warmup_steps)
    return spec.final_fraction + (1 - spec.final_fraction) * (1 + math.cos(math.pi * done)) / 2
