"""The words of the harness as enumerations (see ARCHITECTURE.md for the glossary)."""

from __future__ import annotations

from enum import StrEnum


class Severity(StrEnum):
    """How much a check matters: decides its weight, its roll-up and whether it blocks."""

    CRITICAL = "critical"
    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"


class Outcome(StrEnum):
    """How a check, or one pytest item of it, ended."""

    PASS = "pass"
    WARN = "warn"
    """A limit marked as a warning was missed (medium and low checks only)."""
    FLAKY = "flaky"
    """Passed, but only on a retry."""
    FAIL = "fail"
    ERROR = "error"
    """Could not finish: exception outside the check's own assertion, timeout, crash."""
    XFAIL = "xfail"
    """Failed under a waiver that has not expired."""
    XPASS = "xpass"
    """Passed although a waiver says it fails: the waiver must go."""
    NOT_MEASURED = "not_measured"
    """Skipped, not run, inconclusive, or passed without recording evidence."""
    NOT_APPLICABLE = "not_applicable"
    """Ruled out by a predicate written in the catalogue."""


class Verdict(StrEnum):
    """The answer of a run."""

    PASS = "PASS"
    PASS_WITH_WARNINGS = "PASS_WITH_WARNINGS"
    INCOMPLETE = "INCOMPLETE"
    FAIL = "FAIL"
    PARTIAL = "PARTIAL"
    """Only a selection (`--suite`, `--check`) ran and nothing in it failed."""


class Direction(StrEnum):
    """Which side of its limit a value must be on."""

    AT_MOST = "at_most"
    AT_LEAST = "at_least"
    EQUAL = "equal"
    WITHIN = "within"
    RECORD = "record"
    """No limit: recorded because the report shows it."""


class Profile(StrEnum):
    """Which checks are in scope and how large their measurements are."""

    QUICK = "quick"
    FULL = "full"
    NIGHTLY = "nightly"


class Level(StrEnum):
    """What missing a limit does to the item: fail, or warn (medium and low checks only)."""

    FAIL = "fail"
    WARN = "warn"


UNKNOWN_CHECK = "unknown"
"""Check id of an item of which nobody knows what it checks."""
