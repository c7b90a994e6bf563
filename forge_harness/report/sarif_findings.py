"""Which results a SARIF log has: what of a run is no pass, and how grave it is."""

from __future__ import annotations

from forge_harness.report.machine import (
    UNSCORED_MESSAGE,
    VERDICT_ID,
    ends_well,
    fails_gate,
    file_of,
    verdict_message,
)
from forge_harness.report.model import CheckRow, ItemRow, Report
from forge_harness.report.sarif_baseline import FINE, baseline_results, compared
from forge_harness.report.sarif_model import (
    MORE,
    RECORD,
    UNCOLLECTED,
    UNSCORED,
    VERDICT,
    Finding,
    Level,
    State,
    rule_of,
)
from forge_harness.report.text import clean
from forge_harness.scoring.rollup import SEVERE
from forge_harness.types import Outcome, Severity

MAX_RESULTS = 5_000
"""GitHub shows no more of a run and drops the rest without a word."""
_CATALOGUE = "catalogue.toml"
_LEVELS = ("error", "warning", "note", "none")
_WARNINGS = (Outcome.FAIL, Outcome.ERROR, Outcome.WARN, Outcome.FLAKY)


def findings(report: Report) -> list[Finding]:
    """Returns what a SARIF log says of a run, the gravest first, at most MAX_RESULTS.

    An error is what fails a gate by itself; a warning what else did not pass, with the critical and
    high checks that were not measured; a note what is waived or matters less. Code scanning calls
    a run red by its errors alone: when a run does not end well and has none, `run.verdict` is one.
    Against a baseline that compares each has a state, and what only the baseline had comes last.
    """
    found = [
        _of_check(check, level, report)
        for check in report.checks
        if (level := _level(check, report)) is not None
    ]
    found += [_unscored(item) for item in report.unscored]
    found += [_uncollected(item) for item in report.uncollected]
    if not ends_well(report) and all(finding.level != "error" for finding in found):
        found.append(_verdict(report))
    return _limited(compared(found, report), report)


def _level(check: CheckRow, report: Report) -> Level | None:
    """Returns how grave a check's outcome is; None for one that is no finding."""
    if fails_gate(check, report):
        return "error"
    if check.outcome in FINE:
        return None
    is_open = check.outcome is Outcome.NOT_MEASURED and check.severity in SEVERE
    return "warning" if is_open or check.outcome in _WARNINGS else "note"


def _of_check(check: CheckRow, level: Level, report: Report) -> Finding:
    facts: dict[str, str | int] = {
        "severity": check.severity.value,
        "component": check.component,
    }
    waivers = tuple(w for w in report.waivers if w.live and w.check == clean(check.id))
    return Finding(
        level=level,
        rank=1 + list(Severity).index(check.severity),
        rule=rule_of(check),
        message=check.reason or check.title or check.id,
        # A check that nothing ran for is stated in the catalogue only.
        file=file_of(check.items[0].nodeid) if check.items else _CATALOGUE,
        name=check.id,
        waivers=waivers if check.outcome is Outcome.XFAIL else (),
        facts={"outcome": check.outcome.value, **facts, "command": check.command},
    )


def _unscored(item: ItemRow) -> Finding:
    return Finding(
        level="error",
        rank=1 + len(Severity),
        rule=UNSCORED,
        message=f"{item.nodeid} {UNSCORED_MESSAGE}",
        file=file_of(item.nodeid),
        name=item.nodeid,
        facts={"outcome": item.outcome.value},
    )


def _uncollected(item: ItemRow) -> Finding:
    return Finding(
        level="warning",
        rank=0,
        rule=UNCOLLECTED,
        message=f"{item.nodeid} holds unknown checks, not measured: {item.reason}",
        file=file_of(item.nodeid),
        name=item.nodeid,
        facts={"outcome": item.outcome.value},
    )


def _verdict(report: Report) -> Finding:
    return Finding(
        level="error",
        rank=0,
        rule=VERDICT,
        message=verdict_message(report),
        file=RECORD,
        name=VERDICT_ID,
        facts={"outcome": report.headline.verdict.value},
    )


def _limited(everything: list[Finding], report: Report) -> list[Finding]:
    """Returns at most MAX_RESULTS, the gravest; the last one then says how many more there are."""
    found = sorted(everything, key=lambda finding: (_LEVELS.index(finding.level), finding.rank))
    if len(found) <= MAX_RESULTS:
        return found
    kept, dropped = found[: MAX_RESULTS - 1], found[MAX_RESULTS - 1 :]
    more = Finding(
        level=dropped[0].level,
        rank=0,
        rule=MORE,
        message=f"{len(dropped)} more results are not in this file; see the report.",
        file=RECORD,
        name=MORE.id,
        state=_state_of_more(report) if dropped[0].state else "",
        kind=dropped[0].kind,
    )
    return [*kept, more]


def _state_of_more(report: Report) -> State:
    return "updated" if baseline_results(report) > MAX_RESULTS else "new"
