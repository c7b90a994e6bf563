"""SARIF 2.1.0: one result a check that is not a pass, for code scanning."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from forge_harness.canonical import sha256_hex
from forge_harness.report.anchors import slug
from forge_harness.report.identity import run_guid
from forge_harness.report.machine import TOOL, json_text, moment, tool_version
from forge_harness.report.model import Report, WaiverRow
from forge_harness.report.sarif_findings import findings
from forge_harness.report.sarif_model import RECORD, Finding, Rule
from forge_harness.report.text import clean, shorten

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_MAX_TEXT = 1_024
"""Longest text of a rule that GitHub takes."""
_BASE = "SUITES"
_Values = dict[str, Any]


def render_sarif(report: Report) -> str:
    """Returns the run as a SARIF log; `findings` says what is in it.

    Where in a file a check is stated the record does not know: a result is at its first line. The
    fingerprints name the check, so a result stays the same when files and messages change.
    """
    found = findings(report)
    rules = {finding.rule.id: finding.rule for finding in found}
    order = {name: index for index, name in enumerate(rules)}
    version = tool_version(report)
    run = {
        "tool": {
            "driver": {
                "name": TOOL,
                **({"version": version} if version else {}),
                "rules": [_rule(rule) for rule in rules.values()],
            }
        },
        "automationDetails": {"id": _automation_id(report), "guid": run_guid(report.run_id)},
        **_baseline(report),
        "invocations": [_invocation(report)],
        "originalUriBaseIds": {_BASE: {"description": {"text": "The directory of the suites."}}},
        "results": [_result(finding, order) for finding in found],
        "properties": _properties(report),
    }
    return json_text({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]})


def _baseline(report: Report) -> _Values:
    """Returns what the states of the results refer to; nothing when they have none."""
    run = report.changes.run
    if run is None or report.changes.refusal:
        return {}
    return {"baselineGuid": run_guid(run.run_id)}


def _rule(rule: Rule) -> _Values:
    # Half of what GitHub takes: the escapes of `_message` may double it.
    text = _message(shorten(clean(rule.title) or rule.id, _MAX_TEXT // 2))
    how = shorten(clean(f"Reproduce: {rule.command}"), _MAX_TEXT // 2) if rule.command else ""
    return {
        "id": rule.id,
        "shortDescription": {"text": text},
        "fullDescription": {"text": text},
        "help": {"text": _message(how) or text},
        "defaultConfiguration": {"level": rule.level},
        "properties": rule.facts,
    }


def _result(finding: Finding, order: dict[str, int]) -> _Values:
    rule = finding.rule.id
    identity = sha256_hex(clean(f"{rule}\n{finding.name}").encode())
    return {
        "ruleId": rule,
        "ruleIndex": order[rule],
        **({"kind": finding.kind} if finding.kind else {}),
        **({"baselineState": finding.state} if finding.state else {}),
        "level": finding.level,
        "message": {"text": _message(clean(finding.message) or rule)},
        "locations": [_location(finding)],
        "partialFingerprints": {
            "forgeHarness/v1": identity,
            # The only one that GitHub reads; without it the upload would hash the line's text.
            "primaryLocationLineHash": f"{identity[:16]}:1",
        },
        # Empty where there are none: with no list at all it would be unknown.
        "suppressions": [_suppression(waiver) for waiver in dict.fromkeys(finding.waivers)],
        "properties": finding.facts,
    }


def _location(finding: Finding) -> _Values:
    # "//host/file" would be an address elsewhere.
    file = quote(clean(finding.file).lstrip("/")) or RECORD
    return {
        "physicalLocation": {
            "artifactLocation": {"uri": file, **({"uriBaseId": _BASE} if file != RECORD else {})},
            # GitHub requires a whole region.
            "region": {"startLine": 1, "startColumn": 1, "endLine": 1, "endColumn": 1},
        },
        "logicalLocations": [{"fullyQualifiedName": finding.name}],
    }


def _suppression(waiver: WaiverRow) -> _Values:
    why = f"{waiver.reason} ({waiver.owner}, {waiver.issue}, until {waiver.expires})"
    return {"kind": "external", "status": "accepted", "justification": why}


def _message(text: str) -> str:
    """Returns text that no reader takes for SARIF's placeholders ("{0}") or links ("[a](b)").

    Braces are doubled, as SARIF wants them. For a link that is none there is no escape.
    """
    shown = clean(text, lines=True)
    return shown.replace("{", "{{").replace("}", "}}").replace("](", "] (")


def _automation_id(report: Report) -> str:
    """Returns "category/run": runs of one category replace each other in code scanning.

    So what was measured is the category: subject, profile, part.
    """
    execution = report.execution
    parts = (report.headline.subject, execution.profile, execution.part, report.run_id)
    return "/".join((TOOL, *(slug(clean(part)) for part in parts if part)))


def _invocation(report: Report) -> _Values:
    execution = report.execution
    level = "warning" if execution.state == "finished" else "error"
    times = {"startTimeUtc": execution.started_at, "endTimeUtc": execution.finished_at}
    known = {name: moment(text) for name, text in times.items()}
    return {
        # Whether it came to its end, whatever it found.
        "executionSuccessful": execution.state == "finished",
        **{
            name: f"{time.replace(tzinfo=None).isoformat(timespec='milliseconds')}Z"
            for name, time in known.items()
            if time is not None
        },
        "toolExecutionNotifications": [
            {"level": level, "message": {"text": _message(alert)}}
            for alert in report.headline.alerts
        ],
    }


def _properties(report: Report) -> _Values:
    head = report.headline
    return {
        "runId": report.run_id,
        "verdict": head.verdict.value,
        "meaning": head.meaning,
        "score": {"low": head.low, "high": head.high},
        "measuredPercent": head.measured_percent,
        "scope": head.scope,
        "subject": head.subject,
        "policyDigest": head.policy_digest,
        **_compared_with(report),
    }


def _compared_with(report: Report) -> _Values:
    changes = report.changes
    if changes.run is None:
        return {}
    why = changes.refusal
    return {"baseline": {"runId": changes.run.run_id, "comparable": not why, "reason": why}}
