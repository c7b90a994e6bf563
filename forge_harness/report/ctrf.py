"""CTRF, the Common Test Report Format (https://ctrf.io): one test a check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from forge_harness.report.ctrf_insights import (
    EXTRA,
    STATUS,
    baseline_reference,
    insights_by_test,
    run_insights,
)
from forge_harness.report.identity import report_guid
from forge_harness.report.machine import (
    TOOL,
    UNSCORED_MESSAGE,
    VERDICT_ID,
    ends_well,
    epoch_ms,
    file_of,
    json_text,
    tool_version,
    verdict_message,
)
from forge_harness.report.model import CheckRow, EvidenceRow, ItemRow, Report
from forge_harness.report.text import clean
from forge_harness.types import Outcome

SPEC_VERSION = "0.0.0"
"""The specification's own: a draft that has no other version yet."""
STATUSES = ("passed", "failed", "skipped", "pending", "other")
_Values = dict[str, Any]


def render_ctrf(report: Report) -> str:
    """Returns the run as a CTRF document.

    What was not measured is `other`, never `failed`: nothing was found to be wrong. But readers of
    CTRF call a run red by the count of `failed` alone, so `other` does not suffice: whenever the
    run does not end well and no check failed, a test `run.verdict` fails. A critical or high check
    that was not measured makes the run INCOMPLETE, or an unfinished selection, so it always comes
    with at least one failed test, and the summary is green for no run that is not.

    There is no time of writing, and the id of the document is made from those of the runs in it:
    the same run gives the same bytes.
    """
    insights = insights_by_test(report)
    tests = [_check(check, insights) for check in report.checks]
    tests += [_unscored(item) for item in report.unscored]
    tests += [_uncollected(item) for item in report.uncollected]
    if not ends_well(report) and all(test["status"] != "failed" for test in tests):
        tests.append(_verdict(report))
    version = tool_version(report)
    document = {
        "reportFormat": "CTRF",
        "specVersion": SPEC_VERSION,
        "reportId": report_guid(report),
        "runId": clean(report.run_id) or "unknown",
        "generatedBy": TOOL,
        "results": {
            "tool": {"name": TOOL, **({"version": version} if version else {})},
            "summary": _summary(report, tests),
            "tests": tests,
            "environment": _environment(report),
        },
        **run_insights(report),
        **baseline_reference(report),
    }
    return json_text(document)


def _check(check: CheckRow, insights: Mapping[str, _Values]) -> _Values:
    retries = sum(item.attempts - 1 for item in check.items)
    logs = "\n".join(item.log for item in check.items if item.log)
    test = _test(check.id, check.suite, STATUS[check.outcome], check.duration_s)
    test["rawStatus"] = check.outcome.value
    if check.reason:
        test["message"] = check.reason
    if logs:
        test["trace"] = logs
    if check.items and (file := file_of(check.items[0].nodeid)):
        test["filePath"] = file
    # The record counts the attempts and keeps the last: there are no `retryAttempts` to list.
    if retries > 0:
        test["retries"] = retries
    if check.outcome is Outcome.FLAKY:
        test["flaky"] = True
    test["labels"] = {"severity": check.severity.value, "component": check.component}
    test["extra"] = {EXTRA: _details(check)}
    if known := insights.get(check.id):
        test["insights"] = known
    return test


def _details(check: CheckRow) -> _Values:
    return {
        "title": check.title,
        "severity": check.severity.value,
        "component": check.component,
        "version": check.version,
        "credit": check.credit,
        "points_lost": check.points_lost,
        "command": check.command,
        "evidence": [_evidence(row) for row in check.evidence],
    }


def _evidence(row: EvidenceRow) -> _Values:
    return {
        "item": row.item,
        "name": row.name,
        "value": row.value,
        "actual": row.actual,
        "expected": row.expected,
        "unit": row.unit,
        "state": row.state,
        "reason": row.reason,
    }


def _unscored(item: ItemRow) -> _Values:
    test = _item(item, "failed", UNSCORED_MESSAGE)
    return {**test, "rawStatus": "unscored", "extra": {EXTRA: {"outcome": item.outcome.value}}}


def _uncollected(item: ItemRow) -> _Values:
    message = item.reason or "holds unknown checks"
    return {**_item(item, "other", message), "rawStatus": Outcome.NOT_MEASURED.value}


def _item(item: ItemRow, status: str, message: str) -> _Values:
    test = _test(item.nodeid, "unscored", status, item.duration_s)
    test["message"] = message
    if item.log:
        test["trace"] = item.log
    if file := file_of(item.nodeid):
        test["filePath"] = file
    return test


def _verdict(report: Report) -> _Values:
    test = _test(VERDICT_ID, "run", "failed", 0.0)
    return {
        **test,
        "rawStatus": report.headline.verdict.value,
        "message": verdict_message(report),
    }


def _test(name: str, suite: str, status: str, duration_s: float) -> _Values:
    # Of a name that is nothing but escapes nothing is left to show.
    known = clean(name) or "unknown"
    return {
        "testId": known,
        "name": known,
        "suite": [clean(suite)],
        "status": status,
        "duration": round(duration_s * 1000),
    }


def _summary(report: Report, tests: list[_Values]) -> _Values:
    counts = Counter(test["status"] for test in tests)
    head, execution = report.headline, report.execution
    start = epoch_ms(execution.started_at) or 0
    # Of a run that was killed nobody knows the end; the specification wants a number all the same.
    stop = max(start, epoch_ms(execution.finished_at) or start)
    return {
        "tests": len(tests),
        **{status: counts[status] for status in STATUSES},
        "flaky": sum(test.get("flaky", False) for test in tests),
        "suites": len({test["suite"][0] for test in tests}),
        "start": start,
        "stop": stop,
        "duration": stop - start,
        "extra": {
            EXTRA: {
                "verdict": head.verdict.value,
                "meaning": head.meaning,
                "score": {"low": head.low, "high": head.high},
                "measured_percent": head.measured_percent,
                "scope": head.scope,
                "state": execution.state,
                "alerts": list(head.alerts),
                "policy_digest": head.policy_digest,
                "policy_changes": list(head.policy_changes),
            }
        },
    }


def _environment(report: Report) -> _Values:
    execution = report.execution
    measured = dict(execution.environment)
    known = {
        "reportName": f"{TOOL} {execution.profile}",
        "appName": report.headline.subject,
        "commit": measured.get("git_commit", ""),
        "osPlatform": measured.get("os", "").lower(),
        "osRelease": measured.get("kernel", ""),
        "shardId": execution.shard,
    }
    return {
        **{name: value for name, value in known.items() if clean(value)},
        "extra": {EXTRA: measured},
    }
