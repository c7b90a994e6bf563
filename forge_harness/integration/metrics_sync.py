"""Sets what was measured against what a checkpoint's makers promised, name by name.

Targets are stated by name with value, unit and direction, as a checkpoint carries them under
`targets` of its extras. Units are compared, never converted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from forge_harness.errors import CheckpointError, unknown_choice
from forge_harness.types import Direction

SyncState = Literal["met", "missed", "not measured", "unit mismatch", "not declared"]
Measurements = Mapping[str, tuple[object, str]]
"""Name -> (value, unit)."""
_DIRECTIONS = (Direction.AT_LEAST, Direction.AT_MOST, Direction.EQUAL)
_KEYS = {"value", "unit", "direction"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricTarget:
    """What a metric was promised to be.

    Attributes:
        value: The limit itself is within it.
        unit: "1" for shares and counts.
        direction: At least, at most or equal.
    """

    value: float
    unit: str
    direction: Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One metric of both sides.

    Attributes:
        name: As declared, or as measured where nothing was declared.
        unit: Of the target; of the measurement where nothing was declared.
        direction: Of the target, or None.
        target: Declared value, or None.
        measured: Measured number (possibly NaN), or None.
        measured_unit: Unit of the measurement, or None.
        state: "met" only for a finite number in the target's unit on the right side of it.
    """

    name: str
    unit: str
    direction: Direction | None
    target: float | None
    measured: float | None
    measured_unit: str | None
    state: SyncState


def read_targets(extras: Mapping[str, Any]) -> dict[str, MetricTarget]:
    """Returns the targets in a checkpoint's extras by name; {} when it declares none.

    Raises:
        CheckpointError: They are not {name: {value, unit, direction}} with a finite value and a
            known direction.
    """
    stated = extras.get("targets", {})
    if not isinstance(stated, Mapping):
        raise CheckpointError(
            f"targets is {stated!r}; expected an object of name: {{value, unit, direction}}."
        )
    return {name: _target(name, value) for name, value in stated.items()}


def sync_metrics(
    targets: Mapping[str, MetricTarget], measured: Measurements
) -> tuple[MetricRow, ...]:
    """Compares measurements with targets; every name of either side gets a row, sorted.

    Args:
        targets: As `read_targets` returns them.
        measured: Name -> (value, unit); a value of None, or no number, is not measured.
    """
    return tuple(
        _row(name, targets.get(name), measured.get(name))
        for name in sorted(targets.keys() | measured.keys())
    )


def _target(name: str, stated: object) -> MetricTarget:
    if not isinstance(stated, Mapping) or set(stated) != _KEYS:
        raise CheckpointError(
            f"Target {name!r} is {stated!r}; expected exactly value, unit and direction."
        )
    value, unit, direction = stated["value"], stated["unit"], stated["direction"]
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise CheckpointError(f"Target {name!r} has value {value!r}; expected a finite number.")
    if not isinstance(unit, str) or not unit:
        raise CheckpointError(f"Target {name!r} has unit {unit!r}; expected a name, '1' for none.")
    if direction not in _DIRECTIONS:
        wrong = unknown_choice("direction", str(direction), _DIRECTIONS)
        raise CheckpointError(f"Target {name!r}: {wrong}")
    return MetricTarget(value=number, unit=unit, direction=Direction(direction))


def _row(
    name: str, target: MetricTarget | None, measurement: tuple[object, str] | None
) -> MetricRow:
    value, unit = measurement if measurement is not None else (None, None)
    number = _number(value)
    return MetricRow(
        name=name,
        unit=target.unit if target else cast(str, unit),
        direction=target.direction if target else None,
        target=target.value if target else None,
        measured=number,
        measured_unit=unit,
        state=_state(target, number, unit),
    )


def _state(target: MetricTarget | None, number: float | None, unit: str | None) -> SyncState:
    if target is None:
        return "not declared"
    if number is None:
        return "not measured"
    if unit != target.unit:
        return "unit mismatch"
    return "met" if math.isfinite(number) and _meets(number, target) else "missed"


def _meets(number: float, target: MetricTarget) -> bool:
    if target.direction is Direction.EQUAL:
        return number == target.value
    if target.direction is Direction.AT_MOST:
        return number <= target.value
    return number >= target.value


def _number(value: object) -> float | None:
    """Returns an int or float (NumPy's and torch's scalars too) as float; None for the rest."""
    is_truth = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_truth or isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return None
    try:
        return float(cast(float, value))
    except OverflowError:  # An integer of hundreds of digits.
        return math.inf
    except (TypeError, ValueError):  # Several numbers.
        return None
