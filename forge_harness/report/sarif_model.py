"""Rules and results of a SARIF log, before they are written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from forge_harness.report.machine import VERDICT_ID
from forge_harness.report.model import CheckRow, WaiverRow
from forge_harness.report.text import clean
from forge_harness.types import Severity

Level = Literal["error", "warning", "note", "none"]
State = Literal["", "new", "unchanged", "updated", "absent"]
"""Against the baseline; empty when no result has one."""
Kind = Literal["", "pass", "notApplicable"]
"""Of a result that the run has not; empty is a failure."""

RECORD = "run.json"
"""File of what no file of the suites stands for."""
_RULE_LEVELS: dict[Severity, Level] = {
    Severity.CRITICAL: "error",
    Severity.HIGH: "error",
    Severity.MEDIUM: "warning",
    Severity.LOW: "note",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a result violates."""

    id: str
    title: str
    level: Level
    """Of its results, unless they say otherwise."""
    command: str = ""
    """Reproduces them."""
    facts: dict[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One result."""

    level: Level
    rank: int
    """Among those of a level: 0 first."""
    rule: Rule
    message: str
    file: str
    name: str
    """What tells it from others of its rule; the same in the next run."""
    waivers: tuple[WaiverRow, ...] = ()
    facts: dict[str, str | int] = field(default_factory=dict)
    state: State = ""
    kind: Kind = ""


UNSCORED = Rule(
    id="run.unscored", title="Every item that ran belongs to a check in scope", level="error"
)
UNCOLLECTED = Rule(
    id="run.uncollected", title="Every module of the suites was collected", level="warning"
)
VERDICT = Rule(id=VERDICT_ID, title="The run as a whole passes", level="error")
MORE = Rule(id="run.more", title="All results of the run are in this file", level="note")


def rule_of(check: CheckRow) -> Rule:
    """Returns the rule that a check's result violates."""
    return Rule(
        # Two names that only differ in what no reader sees are one rule.
        id=clean(check.id) or "unknown",
        title=check.title,
        level=_RULE_LEVELS[check.severity],
        command=check.command,
        facts={
            "severity": check.severity.value,
            "component": check.component,
            "version": check.version,
        },
    )
