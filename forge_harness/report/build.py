"""Builds the Report from a record and its policy; nothing else is read but the shipped policy."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from forge_harness.integration.baselines import AcceptedRun
from forge_harness.integration.kept_runs import History
from forge_harness.policy import Policy, load_policy
from forge_harness.record import RunRecord, ShardRecord, Waiver
from forge_harness.report.anchors import check_anchor
from forge_harness.report.changes import changes_since
from forge_harness.report.checks import check_row, item_row
from forge_harness.report.doubts import doubts
from forge_harness.report.load_run import load_run
from forge_harness.report.model import Execution, Headline, Report, Sentence, Span, WaiverRow
from forge_harness.report.quality import SOURCES, quality_tasks
from forge_harness.report.scores import component_rows, loss_rows, suite_rows
from forge_harness.report.specification import specification_sections
from forge_harness.report.text import clean, percent, shorten
from forge_harness.report.trend import trend_of
from forge_harness.scoring import judged_on, listed_changes, policy_changes, waterfall
from forge_harness.types import Verdict

_REASON_LENGTH = 2000
"""The reason of a check has no end; whole it stands with the check."""
MEANINGS = {
    Verdict.PASS: "everything that blocks was measured and passes",
    Verdict.PASS_WITH_WARNINGS: "nothing blocks; the notes below are open",
    Verdict.INCOMPLETE: "no measured violation, but required evidence is missing",
    Verdict.FAIL: "a measured violation blocks",
    Verdict.PARTIAL: "only a selection ran, which is never a release",
}
_CHECK_ID = re.compile(r"(?<![a-z0-9_])[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*")
"""Begun at the start of a word only: within a long one each letter would be a start."""


def build_report(
    record: RunRecord,
    policy: Policy,
    baseline: AcceptedRun | None = None,
    history: History | None = None,
) -> Report:
    """Returns everything a reader of the run should see.

    Args:
        record: The run.
        policy: The policy it was scored with.
        baseline: The run that was accepted before, when there is one.
        history: The kept runs that lead up to it, when there are any.
    """
    steps = waterfall(record, policy)
    lost = {step.id: f"{step.shown:.2f}" for step in steps if step.kind == "check"}
    suites, components = suite_rows(record), component_rows(record, policy)
    checks = tuple(check_row(check, lost) for check in record.checks)
    return Report(
        run_id=clean(record.run_id),
        headline=_headline(record, policy),
        reasons=tuple(
            linked(reason, {check.id for check in record.checks})
            for reason in record.verdict_reasons
        ),
        changes=changes_since(record, policy, baseline),
        trend=trend_of(record, policy, history),
        suites=suites,
        components=components,
        losses=loss_rows(steps),
        quality=quality_tasks(record),
        quality_doubts=doubts(record, SOURCES),
        load=load_run(record),
        checks=checks,
        unscored=tuple(item_row(i) for i in record.unscored_items if not i.hides_checks),
        uncollected=tuple(item_row(i) for i in record.unscored_items if i.hides_checks),
        waivers=tuple(_waiver_row(waiver, record) for waiver in record.waivers),
        specification=specification_sections(record, checks, suites, components),
        provenance=_provenance(record),
        execution=_execution(record),
    )


def linked(reason: str, known: Collection[str]) -> Sentence:
    """Returns a sentence with a link at every check id it names; at the suites without one."""
    text = shorten(clean(reason), _REASON_LENGTH)
    spans: list[Span] = []
    end = 0
    named: set[str] = set()
    for match in _CHECK_ID.finditer(text):
        if match.group() in known and match.group() not in named:
            named.add(match.group())
            spans.append(Span(text=text[end : match.start()]))
            spans.append(Span(text=match.group(), anchor=check_anchor(match.group())))
            end = match.end()
    if end == 0:
        return (Span(text=text, anchor=_section(text)),)
    return tuple(span for span in (*spans, Span(text=text[end:])) if span.text)


def _section(reason: str) -> str:
    """Returns where a reason that names no check in scope is explained."""
    if "waiver" in reason:
        return "waivers"
    if "not in the catalogue's scope" in reason or "belongs to no check" in reason:
        return "unscored"
    if "holds unknown checks" in reason:
        return "uncollected"
    return "provenance" if reason.startswith("the run is ") else "suites"


def _headline(record: RunRecord, policy: Policy) -> Headline:
    score = record.score
    measured = percent(record.coverage)
    changes = tuple(map(clean, policy_changes(policy)))
    return Headline(
        verdict=record.verdict,
        meaning=MEANINGS[record.verdict],
        score=f"Integration score {score.low} (at most {score.high}), {measured} % measured",
        low=score.low,
        high=score.high,
        measured_percent=measured,
        scope=_scope(record),
        subject=clean(record.subject.name),
        policy_digest=record.policy_digest,
        alerts=tuple([*_alerts(record, policy), *_policy_alerts(changes)]),
        policy_changes=changes,
    )


def _scope(record: RunRecord) -> str:
    scope = record.scope
    named = f" ({clean(scope.part)})" if scope.part else ""
    return f"{scope.profile} scope: {scope.in_scope} of {scope.total} checks{named}"


def _alerts(record: RunRecord, policy: Policy) -> list[str]:
    alerts = []
    if record.state != "finished":
        why = f": {clean(record.state_reason)}" if record.state_reason else ""
        alerts.append(f"The run is {record.state}{why}. What it did not reach is not measured.")
    if policy.digest != record.policy_digest:
        alerts.append(
            f"The policy beside this record ({policy.digest}) is not the one it was scored with "
            f"({record.policy_digest}); run forge-harness verify."
        )
    hidden = sum(item.hides_checks for item in record.unscored_items)
    if blocking := len(record.unscored_items) - hidden:
        belong = "item belongs" if blocking == 1 else "items belong"
        blocks = "it blocks" if blocking == 1 else "they block"
        alerts.append(f"{blocking} collected {belong} to no check in scope; {blocks}.")
    if hidden:
        alerts.append(
            f"{hidden} module{'s' if hidden > 1 else ''} of the suites skipped "
            f"{'themselves' if hidden > 1 else 'itself'}; the checks in there are not measured, "
            "and in no count below."
        )
    return alerts


def _policy_alerts(changes: Sequence[str]) -> list[str]:
    if not changes:
        return []
    which = "The policy is not the one that ships with this harness"
    return [f"{which}: {listed_changes(changes)}. That one is {load_policy().digest}."]


def _waiver_row(waiver: Waiver, record: RunRecord) -> WaiverRow:
    outcome = next((c.outcome for c in record.checks if c.id == waiver.check), None)
    return WaiverRow(
        check=clean(waiver.check),
        anchor=None if outcome is None else check_anchor(waiver.check),
        owner=clean(waiver.owner),
        reason=clean(waiver.reason),
        issue=clean(waiver.issue),
        expires=waiver.expires,
        # The date of the run, not of the reader: a report must not change with the calendar.
        live=waiver.expires >= judged_on(record.started_at, record.shards),
        outcome=outcome,
    )


def _execution(record: RunRecord) -> Execution:
    environment = ((key, value) for key, value in _flat(record.environment) if value is not None)
    return Execution(
        state=record.state,
        profile=record.scope.profile.value,
        part=clean(record.scope.part),
        shard=clean(record.scope.shard),
        started_at=clean(record.started_at),
        finished_at=None if record.finished_at is None else clean(record.finished_at),
        environment=tuple((clean(key), clean(_text(value))) for key, value in environment),
    )


def _provenance(record: RunRecord) -> tuple[tuple[str, str], ...]:
    subject = record.subject
    rows: list[tuple[str, Any]] = [
        ("Run", record.run_id),
        ("State", record.state),
        ("Started", record.started_at),
        ("Finished", record.finished_at or "never"),
        ("Command", shlex.join(record.command)),
        ("Seed", record.seed),
        ("Subject", subject.spec),
        ("Subject digest", subject.digest or "none: the subject is not one file"),
        ("Subject capabilities", ", ".join(subject.capabilities) or "none"),
        ("Policy digest", record.policy_digest),
        ("Record schema", record.schema_version),
    ]
    rows += [(f"Declared {key}", value) for key, value in sorted(record.declared.items())]
    rows += [(f"Environment {key}", value) for key, value in _flat(record.environment)]
    rows += [row for shard in record.shards for row in _shard_rows(shard)]
    return tuple((clean(label), clean(_text(value))) for label, value in rows)


def _shard_rows(shard: ShardRecord) -> Iterator[tuple[str, Any]]:
    """Yields where a part of a merged run was measured, and what keeps it as it was."""
    name = f"Merged {shard.scope.part or shard.run_id}"
    yield name, f"{shard.run_id}, {shard.state}, {shard.started_at} to {shard.finished_at}"
    yield f"{name}, command", shlex.join(shard.command)
    yield f"{name}, {shard.file}", shard.digest
    for key in ("cpu", "cpu_usable", "kernel"):
        if key in shard.environment:
            yield f"{name}, {key}", shard.environment[key]


def _flat(values: dict[str, Any], prefix: str = "") -> Sequence[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in sorted(values.items()):
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
