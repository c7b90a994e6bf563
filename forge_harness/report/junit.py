"""JUnit XML: one test case a check, so that its counts are those of the catalogue."""

from __future__ import annotations

from xml.etree import ElementTree

from forge_harness.report.machine import ends_well
from forge_harness.report.model import CheckRow, Report
from forge_harness.sums import sum_in_order
from forge_harness.types import Outcome, Severity, Verdict

NOT_MEASURED_TYPE = "forge.not_measured"
_SEVERE = (Severity.CRITICAL, Severity.HIGH)
_FAILING = (Outcome.FAIL, Outcome.XPASS)
_SKIPPED = (Outcome.NOT_MEASURED, Outcome.NOT_APPLICABLE, Outcome.XFAIL)


def render_junit(report: Report) -> str:
    """Returns the run as JUnit XML.

    A critical or high check that was not measured is an error of type `forge.not_measured`;
    other ones are skipped. A CI that reads only this file must not see green for a run that is
    not: when the run does not end with 0 and no check says why, a case `run.verdict` carries it.
    """
    root = ElementTree.Element("testsuites", name="forge-harness")
    for name in dict.fromkeys(check.suite for check in report.checks):
        suite = ElementTree.SubElement(root, "testsuite", name=name)
        for check in report.checks:
            if check.suite == name:
                _add_check(suite, check)
    if report.unscored or report.uncollected:
        _add_unscored(root, report)
    if not ends_well(report) and not _is_red(root):
        _add_verdict(root, report)
    for suite in root:
        _count(suite)
        _add_properties(suite, report)
    _total(root)
    ElementTree.indent(root)
    body = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}\n'


def _add_check(suite: ElementTree.Element, check: CheckRow) -> None:
    case = _case(suite, check.suite, check.id.partition(".")[2] or check.id, check.duration_s)
    if check.outcome in _FAILING:
        _problem(case, "failure", f"forge.{check.outcome}", check.reason, _details(check))
    elif check.outcome is Outcome.ERROR:
        _problem(case, "error", "forge.error", check.reason, _details(check))
    elif check.outcome is Outcome.NOT_MEASURED and check.severity in _SEVERE:
        _problem(case, "error", NOT_MEASURED_TYPE, check.reason, _details(check))
    elif check.outcome in _SKIPPED:
        message = f"{check.outcome}: {check.reason}" if check.reason else check.outcome.value
        ElementTree.SubElement(case, "skipped", message=message)
    elif check.outcome is not Outcome.PASS:
        ElementTree.SubElement(case, "system-out").text = f"{check.outcome}: {check.reason}"


def _add_unscored(root: ElementTree.Element, report: Report) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name="unscored")
    for item in report.unscored:
        case = _case(suite, "unscored", item.nodeid, item.duration_s)
        message = "belongs to no check in scope; collected checks and catalogue must match"
        _problem(case, "error", "forge.unscored", message, item.log)
    for item in report.uncollected:
        case = _case(suite, "unscored", item.nodeid, item.duration_s)
        _problem(case, "error", NOT_MEASURED_TYPE, item.reason, item.log)


def _add_verdict(root: ElementTree.Element, report: Report) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name="run")
    case = _case(suite, "run", "verdict", 0.0)
    reasons = ["".join(span.text for span in reason) for reason in report.reasons]
    tag = "failure" if report.headline.verdict is Verdict.FAIL else "error"
    message = reasons[0] if reasons else report.headline.meaning
    _problem(case, tag, f"forge.{report.headline.verdict}", message, "\n".join(reasons))


def _case(
    suite: ElementTree.Element, class_name: str, name: str, duration_s: float
) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", classname=class_name, name=name, time=f"{duration_s:.3f}"
    )


def _problem(case: ElementTree.Element, tag: str, kind: str, message: str, text: str) -> None:
    ElementTree.SubElement(case, tag, type=kind, message=message).text = text


def _details(check: CheckRow) -> str:
    missed = [
        f"{row.name}: {row.actual}, expected {row.expected or 'a finite number'} ({row.reason})"
        for row in check.evidence
        if row.state in ("fail", "warn")
    ]
    logs = [item.log for item in check.items if item.log]
    return "\n".join([check.title, check.reason, *missed, f"Reproduce: {check.command}", *logs])


def _is_red(root: ElementTree.Element) -> bool:
    return any(True for tag in ("failure", "error") for _ in root.iter(tag))


def _count(suite: ElementTree.Element) -> None:
    cases = suite.findall("testcase")
    suite.set("tests", str(len(cases)))
    for plural, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(plural, str(sum(case.find(tag) is not None for case in cases)))
    suite.set("time", f"{sum_in_order(float(case.get('time', '0')) for case in cases):.3f}")


def _add_properties(suite: ElementTree.Element, report: Report) -> None:
    head = report.headline
    properties = ElementTree.Element("properties")
    for name, value in (
        ("forge.run_id", report.run_id),
        ("forge.verdict", head.verdict.value),
        ("forge.score", f"{head.low} to {head.high}"),
        ("forge.policy_digest", head.policy_digest),
    ):
        ElementTree.SubElement(properties, "property", name=name, value=value)
    suite.insert(0, properties)


def _total(root: ElementTree.Element) -> None:
    for name in ("tests", "failures", "errors", "skipped"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    root.set("time", f"{sum_in_order(float(suite.get('time', '0')) for suite in root):.3f}")
