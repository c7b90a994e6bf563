"""One record for each scheduled request, written as JSON lines by the process that sent it.

A request that was never sent, or never answered, has a record too: what only completions tell
hides exactly the seconds in which the server stood still.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from forge_harness.errors import LoadError

LACKING = "no more files or ports"
"""Begins the detail of a dropped request for which the generator could open no connection."""


class Fate(StrEnum):
    """How a scheduled request ended; each has exactly one."""

    OK = "ok"
    """Answered in time, and as expected."""
    SHED = "shed"
    """Refused with 429 or 503 and Retry-After."""
    ERROR = "error"
    """Any other status, a wrong or truncated answer, or a broken connection."""
    TIMEOUT = "timeout"
    """No whole answer before the deadline (504 included: the server's own word for it)."""
    DROPPED = "dropped"
    """Not sent: too many were in flight, or the generator had no more files or ports. Its own
    fault, so the run is invalid."""
    CENSORED = "censored"
    """Not known: the run was stopped, or the generator died, before it ended."""


@dataclass(slots=True)
class Record:
    """A scheduled request. Times are seconds from the start of the run."""

    index: int
    """Position in the schedule."""
    intended: float
    kind: int
    """Which request of the request file."""
    sent: float | None = None
    first: float | None = None
    """First byte of the answer's body."""
    done: float | None = None
    status: int | None = None
    fate: Fate = Fate.CENSORED
    request_id: str = ""
    size: int = 0
    """Bytes of the answer's body."""
    detail: str = ""
    """What was wrong, for errors."""

    @property
    def response_s(self) -> float:
        """From when it was due to the whole answer; infinite when there was none in time."""
        return math.inf if self._answered is None else self._answered - self.intended

    @property
    def service_s(self) -> float:
        """From when it was sent to the whole answer; infinite when there was none in time."""
        if self._answered is None or self.sent is None:
            return math.inf
        return self._answered - self.sent

    @property
    def _answered(self) -> float | None:
        """When the answer was whole. A 504 says that there is none, however soon it says so."""
        return None if self.status is None or self.fate is Fate.TIMEOUT else self.done

    @property
    def lateness_s(self) -> float | None:
        """How much later than due the generator sent it; None when it did not."""
        return None if self.sent is None else self.sent - self.intended

    def line(self) -> str:
        """Returns the record as a JSON line."""
        return json.dumps(
            {
                "index": self.index,
                "kind": self.kind,
                "intended": round(self.intended, 6),
                "sent": _rounded(self.sent),
                "first": _rounded(self.first),
                "done": _rounded(self.done),
                "status": self.status,
                "class": self.fate.value,
                "request_id": self.request_id,
                "bytes": self.size,
                "detail": self.detail,
            },
            separators=(",", ":"),
        )


def parse_line(line: str) -> Record:
    """Reads a JSON line.

    Raises:
        ValueError: It is none, or no record.
    """
    try:
        content: dict[str, Any] = json.loads(line)
        _check_types(content)
        return Record(
            index=content["index"],
            kind=content["kind"],
            intended=content["intended"],
            sent=content["sent"],
            first=content["first"],
            done=content["done"],
            status=content["status"],
            fate=Fate(content["class"]),
            request_id=content["request_id"],
            size=content["bytes"],
            detail=content["detail"],
        )
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no record: {error}") from error


def _check_types(content: dict[str, Any]) -> None:
    numbers = (content["intended"], *(content[key] or 0 for key in ("sent", "first", "done")))
    whole = (content["index"], content["kind"], content["bytes"], content["status"] or 0)
    if not all(isinstance(value, int) for value in whole):
        raise TypeError("something else than a whole number")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
        raise TypeError("something else than a time")
    if not (isinstance(content["request_id"], str) and isinstance(content["detail"], str)):
        raise TypeError("something else than text")


def read_records(directory: Path) -> list[Record]:
    """Reads the records of every worker of a run, in no order.

    A last line cut off by the death of its writer is left out; `account` then finds it missing.

    Raises:
        LoadError: There are none, or a line that is not the last is damaged.
    """
    files = sorted(directory.glob("records-*.jsonl"))
    if not files:
        raise LoadError(f"{directory} holds no records-*.jsonl; expected the directory of a run.")
    found: list[Record] = []
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except ValueError as error:
            raise LoadError(f"{path} is no text ({error}); run the load again.") from error
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                found.append(parse_line(line))
            except ValueError as error:
                if number == len(lines):
                    break
                raise LoadError(f"{path}, line {number} is no record ({error}).") from error
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The schedule set against the records: every request has exactly one, or the books are off."""

    records: tuple[Record, ...]
    """One for each scheduled request, by index; missing ones are censored."""
    missing: int
    duplicated: int
    foreign: int
    """Records that no request of the schedule has."""

    @property
    def balanced(self) -> bool:
        """Whether each scheduled request has exactly one record."""
        return not (self.missing or self.duplicated or self.foreign)

    def count(self, fate: Fate) -> int:
        """Returns how many requests ended so."""
        return sum(record.fate is fate for record in self.records)


def account(records: Iterable[Record], due: Sequence[float], kinds: Sequence[int]) -> Account:
    """Sets records against the schedule they should follow.

    Args:
        records: What the workers wrote.
        due: Scheduled times in seconds, ascending, made again from the plan.
        kinds: Which request each sends.
    """
    by_index: dict[int, Record] = {}
    duplicated = foreign = 0
    for record in records:
        known = 0 <= record.index < len(due)
        if not known or abs(record.intended - due[record.index]) > 1e-5:
            foreign += 1
        elif record.index in by_index:
            duplicated += 1
        else:
            by_index[record.index] = record
    whole = tuple(
        by_index.get(index) or Record(index, intended, kinds[index], detail="no record")
        for index, intended in enumerate(due)
    )
    return Account(
        records=whole,
        missing=len(due) - len(by_index),
        duplicated=duplicated,
        foreign=foreign,
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
