"""Values of a whole run that stand for figures of the specification."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from forge_harness.record import CheckRecord, RunRecord
from forge_harness.report.anchors import check_anchor
from forge_harness.report.model import State
from forge_harness.report.text import duration, number, percent
from forge_harness.types import Outcome, Severity, Verdict

RunValue = tuple[str, State, str, str]
"""Shown value, state, anchor, note."""

_VERDICTS: dict[Verdict, State] = {
    Verdict.PASS: "pass",
    Verdict.PASS_WITH_WARNINGS: "warn",
    Verdict.INCOMPLETE: "not_measured",
    Verdict.FAIL: "fail",
    Verdict.PARTIAL: "not_measured",
}
_FAILED = (Outcome.FAIL, Outcome.ERROR, Outcome.XPASS)


def verdict_state(verdict: Verdict) -> State:
    """Returns how a verdict is shown."""
    return _VERDICTS[verdict]


def _verdict(record: RunRecord) -> RunValue:
    return record.verdict, _VERDICTS[record.verdict], "verdict", ""


def _score(record: RunRecord) -> RunValue:
    score = record.score
    text = f"{score.low} (at most {score.high})"
    return text, _VERDICTS[record.verdict], "suites", f"{percent(record.coverage)} % measured"


def _coverage(record: RunRecord) -> RunValue:
    state: State = "pass" if record.coverage >= 0.9 else "not_measured"
    return f"{percent(record.coverage)} %", state, "suites", "weight measured with evidence"


def _scope(record: RunRecord) -> RunValue:
    scope = record.scope
    text = f"{scope.in_scope} of {scope.total} checks"
    return text, "info", "suites", f"{scope.profile} scope"


def _critical_failures(record: RunRecord) -> RunValue:
    critical = [check for check in record.checks if check.severity is Severity.CRITICAL]
    failed = sum(check.outcome in _FAILED for check in critical)
    open_ends = sum(check.outcome is Outcome.NOT_MEASURED for check in critical)
    note = f"of {len(critical)} critical checks, {open_ends} not measured"
    clean: State = "not_measured" if open_ends or not critical else "pass"
    return number(failed), "fail" if failed else clean, "checks", note


def _gates_passed(record: RunRecord) -> RunValue:
    gates = [c for c in record.checks if c.suite == "gates" and _applies(c)]
    if not gates:
        return "not measured", "not_measured", "suites", "no gate is in scope"
    passed = sum(check.outcome is Outcome.PASS for check in gates)
    failed = any(check.outcome in _FAILED for check in gates)
    missing = any(check.outcome is Outcome.NOT_MEASURED for check in gates)
    state: State = "fail" if failed else "not_measured" if missing else "pass"
    if passed < len(gates) and state == "pass":
        state = "warn"
    return f"{passed} of {len(gates)}", state, check_anchor(gates[0].id), "gate checks that pass"


def _duration(record: RunRecord) -> RunValue:
    if record.finished_at is None:
        return "not measured", "not_measured", "provenance", "the run never finished"
    begun, ended = map(datetime.fromisoformat, (record.started_at, record.finished_at))
    return duration((ended - begun).total_seconds()), "info", "provenance", "start to finish"


def _evidence(record: RunRecord) -> RunValue:
    count = sum(len(check.evidence) for check in record.checks)
    return number(count), "info", "checks", "recorded values"


def _artifacts(record: RunRecord) -> RunValue:
    names = {e.artifact for check in record.checks for e in check.evidence if e.artifact}
    return number(len(names)), "info", "checks", "files stored by their digest"


def _flaky(record: RunRecord) -> RunValue:
    count = sum(check.outcome is Outcome.FLAKY for check in record.checks)
    return number(count), "warn" if count else "info", "checks", "checks that passed on a retry"


def _waivers(record: RunRecord) -> RunValue:
    count = sum(check.outcome is Outcome.XFAIL for check in record.checks)
    return number(count), "warn" if count else "info", "waivers", "checks that fail under a waiver"


def _items(*outcomes: Outcome) -> Callable[[RunRecord], RunValue]:
    def count(record: RunRecord) -> RunValue:
        ended = [item.outcome for check in record.checks for item in check.items]
        ended += [item.outcome for item in record.unscored_items]
        chosen = [outcome for outcome in ended if not outcomes or outcome in outcomes]
        share = f"{100 * len(chosen) // len(ended)} % of the items that ran" if ended else ""
        return number(len(chosen)), "info", "checks", share if outcomes else ""

    return count


def _applies(check: CheckRecord) -> bool:
    return check.outcome is not Outcome.NOT_APPLICABLE


RUN_VALUES: dict[str, tuple[str, Callable[[RunRecord], RunValue]]] = {
    "verdict": ("verdict of the run", _verdict),
    "score": ("integration score of the run", _score),
    "coverage": ("coverage of the run", _coverage),
    "scope": ("scope of the run", _scope),
    "critical_failures": ("critical checks that failed", _critical_failures),
    "gates_passed": ("gate checks that pass", _gates_passed),
    "duration": ("duration of the run", _duration),
    "evidence": ("values recorded in the run", _evidence),
    "artifacts": ("files stored in the run", _artifacts),
    "flaky": ("flaky checks of the run", _flaky),
    "waivers": ("waived checks of the run", _waivers),
    "items": ("pytest items of the run", _items()),
    "items_passed": ("pytest items that passed", _items(Outcome.PASS)),
    "items_failed": (
        "pytest items that failed",
        _items(Outcome.FAIL, Outcome.ERROR, Outcome.XPASS),
    ),
    "items_not_measured": ("pytest items not measured", _items(Outcome.NOT_MEASURED)),
}
"""Name in specification.toml -> (what it is, how it is read from the record)."""
