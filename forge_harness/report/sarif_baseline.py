"""Which results of a SARIF log the baseline had, and which of the baseline's are gone.

Results have a state all of them or none (SARIF 2.1.0, 3.27.24), so the baseline must compare with
the run. What counts as a change of a result is its outcome: of the rest a baseline keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from forge_harness.report.machine import VERDICT_ID, ended_well, ends_well
from forge_harness.report.model import BaselineRun, CheckRow, Report
from forge_harness.report.sarif_model import (
    RECORD,
    UNCOLLECTED,
    UNSCORED,
    VERDICT,
    Finding,
    State,
    rule_of,
)
from forge_harness.report.text import clean
from forge_harness.types import Outcome, Severity

FINE = (Outcome.PASS, Outcome.NOT_APPLICABLE)
"""Outcomes that are no result."""


def compared(found: Sequence[Finding], report: Report) -> list[Finding]:
    """Returns the results with their states, and behind them those only the baseline had."""
    run = report.changes.run
    if run is None or report.changes.refusal:
        return list(found)
    before = {name: outcome for name, _, outcome in run.outcomes}
    states = [_with_state(finding, run, before, report) for finding in found]
    return [*states, *_absent(found, run, before, report)]


def baseline_results(report: Report) -> int:
    """Returns how many results a log of the baseline has, without one for its verdict."""
    run = report.changes.run
    if run is None:
        return 0
    checks = sum(outcome not in FINE for _, _, outcome in run.outcomes)
    return checks + len(run.unscored) + len(run.uncollected)


def _with_state(
    finding: Finding, run: BaselineRun, before: Mapping[str, Outcome], report: Report
) -> Finding:
    name = clean(finding.name)
    if finding.rule.id == VERDICT_ID:
        return replace(finding, state=_verdict_state(run, report))
    if finding.rule.id in (UNSCORED.id, UNCOLLECTED.id):
        known = run.unscored if finding.rule.id == UNSCORED.id else run.uncollected
        return replace(finding, state="unchanged" if name in known else "new")
    then = before.get(name)
    if then is None or then in FINE:
        return replace(finding, state="new")
    state: State = "unchanged" if finding.facts["outcome"] == then.value else "updated"
    facts = {**finding.facts, "baselineOutcome": then.value}
    return replace(finding, state=state, facts=facts)


def _verdict_state(run: BaselineRun, report: Report) -> State:
    """Returns the state of `run.verdict`: whether the baseline as a whole passed, listed or not."""
    if _ended_well(run):
        return "new"
    return "unchanged" if run.verdict is report.headline.verdict else "updated"


def _ended_well(run: BaselineRun) -> bool:
    outcomes = [outcome for _, _, outcome in run.outcomes]
    return ended_well(run.verdict, outcomes, unplaced=bool(run.unscored or run.uncollected))


def _absent(
    found: Sequence[Finding], run: BaselineRun, before: Mapping[str, Outcome], report: Report
) -> Iterator[Finding]:
    here = {(finding.rule.id, clean(finding.name)) for finding in found}
    for check in report.checks:
        then = before.get(clean(check.id), Outcome.PASS)
        if then not in FINE and (rule_of(check).id, clean(check.id)) not in here:
            yield _gone_check(check, then)
    for rule, names in ((UNSCORED, run.unscored), (UNCOLLECTED, run.uncollected)):
        for name in names:
            if (rule.id, name) not in here:
                message = f"{name} is not among them any more."
                yield Finding(
                    level="none",
                    rank=1 + len(Severity),
                    rule=rule,
                    message=message,
                    file=name.partition("::")[0],
                    name=name,
                    state="absent",
                    kind="pass",
                )
    if ends_well(report) and not _ended_well(run):
        yield Finding(
            level="none",
            rank=0,
            rule=VERDICT,
            message=f"The run passes; the baseline was {run.verdict.value}.",
            file=RECORD,
            name=VERDICT_ID,
            state="absent",
            kind="pass",
        )


def _gone_check(check: CheckRow, then: Outcome) -> Finding:
    is_out = check.outcome is Outcome.NOT_APPLICABLE
    now = "does not apply now" if is_out else "passes now"
    return Finding(
        level="none",
        rank=1 + list(Severity).index(check.severity),
        rule=rule_of(check),
        message=f"{check.id} {now}; in the baseline it ended as {then.value.replace('_', ' ')}.",
        file=_file(check),
        name=check.id,
        facts={"outcome": check.outcome.value, "baselineOutcome": then.value},
        state="absent",
        kind="notApplicable" if is_out else "pass",
    )


def _file(check: CheckRow) -> str:
    return check.items[0].nodeid.partition("::")[0] if check.items else "catalogue.toml"
