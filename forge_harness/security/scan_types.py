"""What a scan says: clean, found, or not scanned; never clean without a canary found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from forge_harness.canonical import digest_of

State = Literal["clean", "found", "not scanned"]


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One thing a scan found.

    Attributes:
        place: `file`, or `distribution version`.
        line: Line of the file, counted from 1; 0 where there is none.
        rule: Advisory id, rule code or name of the form.
        what: One clause. A secret itself is never in it.
    """

    place: str
    line: int
    rule: str
    what: str

    def sentence(self) -> str:
        """Returns `file:line: rule: what`."""
        where = f"{self.place}:{self.line}" if self.line else self.place
        return f"{where}: {self.rule}: {self.what}"


@dataclass(frozen=True, slots=True)
class Scan:
    """The answer of one scanner.

    Attributes:
        name: What was looked for, for example "secrets".
        state: The answer.
        tool: What looked.
        version: Of the tool, or of its data.
        scanned: How many files or distributions it looked at, the canary not counted.
        findings: In order.
        canary: What it was given to find, and found; "" when it did not.
        why_not: Why nothing was scanned; "" otherwise.
        notes: What a reader must know besides.
        data_age_days: Age of the data it looked things up in, None without such data.
    """

    name: str
    state: State
    tool: str
    version: str
    scanned: int
    findings: tuple[Finding, ...] = ()
    canary: str = ""
    why_not: str = ""
    notes: tuple[str, ...] = ()
    data_age_days: float | None = None

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of the findings."""
        return digest_of([asdict(finding) for finding in self.findings])

    def as_json(self) -> dict[str, Any]:
        """Returns the scan as JSON values, digest included."""
        return {**asdict(self), "digest": self.digest}


def not_scanned(
    name: str, tool: str, why: str, *, version: str = "", age: float | None = None
) -> Scan:
    """Returns the answer of a scanner that could not look."""
    return Scan(name, "not scanned", tool, version, 0, why_not=why, data_age_days=age)


def judged(
    name: str,
    tool: str,
    version: str,
    scanned: int,
    findings: Iterable[Finding],
    *,
    canary: str,
    missed: Iterable[str],
    notes: tuple[str, ...] = (),
    age: float | None = None,
) -> Scan:
    """Returns the answer of a scanner that looked.

    Args:
        name: What was looked for.
        tool: What looked.
        version: Of the tool, or of its data.
        scanned: How many things it looked at.
        findings: What it found, canary excluded.
        canary: What it was given to find.
        missed: The parts of the canary it did not find: with any, nothing was scanned.
        notes: What a reader must know besides.
        age: Age of the tool's data in days.
    """
    if lost := sorted(missed):
        why = f"it did not find its canary ({', '.join(lost)})"
        return not_scanned(name, tool, why, version=version, age=age)
    if scanned == 0:
        return not_scanned(name, tool, "there was nothing to look at", version=version, age=age)
    ordered = tuple(sorted(set(findings)))
    state: State = "found" if ordered else "clean"
    return Scan(name, state, tool, version, scanned, ordered, canary, "", notes, age)
