"""Evidence: named values with unit, limit and reason, recorded by checks.

A check without evidence is not measured. Evidence travels on pytest's reports
(`item.user_properties`), so a run is the same with and without xdist.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forge_harness.durable import write_durably
from forge_harness.types import Direction, Level

Scalar = bool | int | float | str
MAX_SAMPLES = 2000
"""Longer series belong in an artifact: run.json is read whole by every tool."""
_MAX_JSON_INT = 2**53 - 1
_NON_FINITE = frozenset({"nan", "inf", "-inf"})


def printable(text: str) -> str:
    """Returns a text with what no UTF-8 writer takes (lone surrogates) written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def largest(values: Iterable[float]) -> float:
    """Returns the largest value; NaN, which satisfies no limit, where one is NaN or there is none.

    Of Python's own, max(0.0, nan) is 0.0: what could not be computed would not be seen.
    """
    known = list(values)
    return math.nan if not known or any(math.isnan(value) for value in known) else max(known)


def smallest(values: Iterable[float]) -> float:
    """Returns the smallest value; NaN where one is NaN or there is none, as `largest`."""
    return -largest(-value for value in values)


class EvidenceFailure(AssertionError):
    """A recorded value missed its limit."""


def plain(value: object, name: str) -> Scalar:
    """Converts a scalar to what may cross process and JSON borders.

    NumPy and torch scalars become Python numbers. Non-finite floats become the strings
    "nan", "inf" and "-inf", which satisfy no limit.

    Raises:
        TypeError: For arrays and other objects, naming the evidence.
    """
    if not isinstance(value, bool | int | float | str) and hasattr(value, "item"):
        if getattr(value, "ndim", 0) != 0 and getattr(value, "size", None) != 1:
            raise TypeError(
                f"evidence {name!r} is an array; record a scalar, samples=[...] or an artifact"
            )
        value = value.item()
    # Exact types: execnet, which carries reports between processes, knows no subclasses, and
    # numpy.float64 is one of float, torch's version one of str.
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return printable(str(value))
    if isinstance(value, int):
        return int(value) if abs(value) <= _MAX_JSON_INT else str(int(value))
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    raise TypeError(
        f"evidence {name!r} is of type {type(value).__name__}; expected a number, text or boolean"
    )


def _measured(value: object, name: str) -> Scalar:
    """Returns a scalar that is held against a bound: an integer stays a number, whatever its size.

    Beyond 2**53 - 1, where JSON has no integers, it is the nearest float: text, which `plain` makes
    of it, is on no side of a bound.
    """
    scalar = plain(value, name)
    if isinstance(scalar, str) and not isinstance(value, str) and scalar not in _NON_FINITE:
        try:
            return float(int(scalar))
        except OverflowError:
            return "-inf" if scalar.startswith("-") else "inf"
        except ValueError:
            return scalar  # text in an array
    return scalar


def satisfied(value: Scalar, limit: object, direction: str) -> bool:
    """Returns whether `value` is on the right side of `limit`; a non-finite value never is."""
    if isinstance(value, str) and value in _NON_FINITE:
        return False
    if direction == Direction.RECORD:
        return True
    if direction == Direction.EQUAL:
        return (type(value) is type(limit) and value == limit) or _equal_numbers(value, limit)
    if not _is_number(value):
        return False
    if direction == Direction.AT_MOST:
        return _is_number(limit) and value <= limit  # type: ignore[operator]
    if direction == Direction.AT_LEAST:
        return _is_number(limit) and value >= limit  # type: ignore[operator]
    if direction == Direction.WITHIN:
        if not isinstance(limit, list | tuple) or len(limit) != 2:
            return False
        low, high = limit
        return _is_number(low) and _is_number(high) and low <= value <= high
    return False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _equal_numbers(value: object, limit: object) -> bool:
    return _is_number(value) and _is_number(limit) and value == limit


_MISSED = {
    Direction.AT_MOST: "over its limit of",
    Direction.AT_LEAST: "under its limit of",
    Direction.EQUAL: "expected",
    Direction.WITHIN: "outside",
    Direction.RECORD: "not finite; expected",
}
_NOT_FINITE = {
    Direction.AT_MOST: "not finite; expected at most",
    Direction.AT_LEAST: "not finite; expected at least",
    Direction.EQUAL: "expected",
    Direction.WITHIN: "not finite; expected within",
    Direction.RECORD: "not finite; expected",
}
"""What is wrong with a value, by the side of its limit that it had to be on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One measured value.

    `samples` holds the raw data when the value is a statistic; `artifact` the
    `evidence/sha256/<hex>` name of a file when the data are too large for run.json.
    """

    name: str
    value: Scalar
    unit: str = "1"
    limit: Scalar | list[float] | None = None
    direction: str = Direction.RECORD.value
    level: str = Level.FAIL.value
    reason: str = ""
    samples: list[float] | None = None
    artifact: str | None = None

    def ok(self) -> bool:
        """Returns whether the value is on the right side of its limit."""
        return satisfied(self.value, self.limit, self.direction)

    def sentence(self) -> str:
        """Returns the one line a failing check prints."""
        unit = "" if self.unit == "1" else f" {self.unit}"
        # NaN and infinities are on no side of a limit, which would read "inf, under its limit".
        is_finite = not (isinstance(self.value, str) and self.value in _NON_FINITE)
        wanted = (_MISSED if is_finite else _NOT_FINITE)[Direction(self.direction)]
        bounds = self.limit if isinstance(self.limit, list) else [self.limit]
        # Six digits of a value just past its limit are those of the limit.
        show = repr if _show(self.value) in map(_show, bounds) else _show
        limit = "a number" if self.limit is None else _with_unit(self.limit, unit, show)
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.name} is {_with_unit(self.value, unit, show)}, {wanted} {limit}{why}"


def _with_unit(value: object, unit: str, show: Callable[[object], str]) -> str:
    """Returns a value with its unit; of an empty text, which would not show, that there is none."""
    if value == "":
        return f"no{unit}" if unit else "empty"
    return f"{show(value)}{unit}"


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_show(v) for v in value) + "]"
    return str(value)


@dataclass(slots=True)
class Recorder:
    """Records the evidence of one pytest item (the `evidence` fixture).

    Limits are checked when recorded: a missed one fails the check at once, unless it is
    recorded with `level="warn"`.
    """

    sink: list[tuple[str, Any]]
    artifact_dir: Path | None = None
    recorded: list[Evidence] = field(default_factory=list)

    def record(
        self,
        name: str,
        value: object,
        *,
        unit: str = "1",
        reason: str = "",
        samples: Sequence[float] | None = None,
    ) -> None:
        """Records a value without a limit; a non-finite one fails the check."""
        __tracebackhide__ = True
        self._add(name, value, unit, None, Direction.RECORD, Level.FAIL, reason, samples)

    def at_most(
        self,
        name: str,
        value: object,
        *,
        limit: float,
        unit: str = "1",
        reason: str,
        samples: Sequence[float] | None = None,
        level: str = "fail",
    ) -> None:
        """Records a value that must not exceed `limit`."""
        __tracebackhide__ = True
        self._add(name, value, unit, limit, Direction.AT_MOST, Level(level), reason, samples)

    def at_least(
        self,
        name: str,
        value: object,
        *,
        limit: float,
        unit: str = "1",
        reason: str,
        samples: Sequence[float] | None = None,
        level: str = "fail",
    ) -> None:
        """Records a value that must not fall below `limit`."""
        __tracebackhide__ = True
        self._add(name, value, unit, limit, Direction.AT_LEAST, Level(level), reason, samples)

    def equal(
        self,
        name: str,
        value: object,
        *,
        expected: object,
        unit: str = "1",
        reason: str,
        level: str = "fail",
    ) -> None:
        """Records a value that must equal `expected` exactly."""
        __tracebackhide__ = True
        wanted = plain(expected, name)
        self._add(name, value, unit, wanted, Direction.EQUAL, Level(level), reason, None)

    def within(
        self,
        name: str,
        value: object,
        *,
        low: float,
        high: float,
        unit: str = "1",
        reason: str,
        samples: Sequence[float] | None = None,
        level: str = "fail",
    ) -> None:
        """Records a value that must lie in [low, high]."""
        __tracebackhide__ = True
        bounds = [float(low), float(high)]
        for bound in bounds:
            if not math.isfinite(bound):
                raise ValueError(
                    f"evidence {name!r} has the bound {bound}; expected finite numbers: use "
                    "at_most or at_least for a limit on one side."
                )
        self._add(name, value, unit, bounds, Direction.WITHIN, Level(level), reason, samples)

    def artifact(self, name: str, path: Path, *, reason: str = "") -> None:
        """Stores a file under `evidence/sha256/<hex>` of the run and records its digest."""
        content = path.read_bytes()  # once: a file still written to would not be what its name says
        digest = hashlib.sha256(content).hexdigest()
        stored = None
        if self.artifact_dir is not None:
            target = self.artifact_dir / "sha256" / digest
            if not target.exists():
                write_durably(target, content)
            stored = f"evidence/sha256/{digest}"
        value, name = f"sha256:{digest}", printable(name)
        self._push(Evidence(name=name, value=value, reason=printable(reason), artifact=stored))

    def _add(
        self,
        name: str,
        value: object,
        unit: str,
        limit: object,
        direction: Direction,
        level: Level,
        reason: str,
        samples: Sequence[float] | None,
    ) -> None:
        __tracebackhide__ = True  # a missed limit is reported where the check recorded it
        # What must be equal, or is only recorded, keeps every digit.
        bounded = direction not in (Direction.EQUAL, Direction.RECORD)
        read = _measured if bounded else plain
        kept_limit: Any = limit
        if limit is not None and not isinstance(limit, list):
            kept_limit = read(limit, f"limit of {name}")
        evidence = Evidence(
            name=printable(str(name)),
            value=read(value, name),
            unit=printable(str(unit)),
            limit=kept_limit,
            direction=direction.value,
            level=level.value,
            reason=printable(str(reason)),
            samples=_plain_samples(samples, name),
        )
        self._push(evidence)
        if not evidence.ok() and level is Level.FAIL:
            raise EvidenceFailure(evidence.sentence())

    def _push(self, evidence: Evidence) -> None:
        if any(previous.name == evidence.name for previous in self.recorded):
            raise ValueError(f"evidence {evidence.name!r} is recorded twice in one item")
        self.recorded.append(evidence)
        self.sink.append(("forge_evidence", asdict(evidence)))


def _plain_samples(samples: Sequence[float] | None, name: str) -> list[float] | None:
    if samples is None:
        return None
    if len(samples) > MAX_SAMPLES:
        raise ValueError(
            f"evidence {name!r} has {len(samples)} samples; at most {MAX_SAMPLES} go into "
            "run.json, store the rest with evidence.artifact"
        )
    numbers = [float(sample) for sample in samples]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"evidence {name!r} has non-finite samples")
    return numbers
