"""From the reports of one pytest item to its outcome."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from forge_harness._pytest.gate import NOT_APPLICABLE
from forge_harness._pytest.marks import own_limit
from forge_harness.evidence import printable
from forge_harness.types import Level, Outcome

if TYPE_CHECKING:
    from forge_harness.record import ItemRecord

EVIDENCE_KEY = "forge_evidence"
CALLS = pytest.StashKey[int]()
"""How often an item was called: more than once when something retries it (pytest-retry, flaky)."""
STARTED = pytest.StashKey[float]()
"""Monotonic time at which an item's time limit began to run."""
_FAILURES = {"assertion", "exception", "timeout"}
"""Kinds of `Raised` that no report turns into anything better."""
_STRICT_XPASS = "[XPASS(strict)]"
"""How pytest begins what it says of a strict xfail that passed; nothing is raised."""
_REASON_CHARS = 500
_LOG_CHARS = 6000
_TIMEOUT = re.compile(r"Timeout \(>\s*([0-9.]+)s\) from pytest-timeout")


@dataclass(frozen=True, slots=True)
class Raised:
    """What ended a phase, in words that cross process borders."""

    kind: str
    """`assertion`, `exception`, `timeout`, `xfail`, `skip` or `not_applicable`."""
    reason: str


def describe(item: pytest.Item, call: pytest.CallInfo[Any]) -> Raised | None:
    """Returns what ended a phase of an item, or None when nothing was raised."""
    if call.excinfo is None:
        return None
    error = call.excinfo.value
    if isinstance(error, pytest.skip.Exception):
        kind = "not_applicable" if item.stash.get(NOT_APPLICABLE, False) else "skip"
        return Raised(kind, first_line(str(error.msg)))
    if isinstance(error, pytest.xfail.Exception):
        return Raised("xfail", first_line(str(error.msg)))
    if isinstance(error, pytest.fail.Exception):
        timeout = _TIMEOUT.search(str(error))
        if timeout is not None:
            return Raised("timeout", f"timed out after {float(timeout[1]):g} s")
        return Raised("assertion", first_line(str(error)) or "failed")
    if isinstance(error, AssertionError):
        said = first_line(str(error)) or f"assertion failed in {_place(call.excinfo)}"
        return Raised("assertion", said)
    said = str(error).strip() or f"raised in {_place(call.excinfo)}"
    return Raised("exception", first_line(f"{type(error).__name__}: {said}"))


def _place(raised: pytest.ExceptionInfo[BaseException]) -> str:
    """Where an error without words of its own came from, which is all there is to say of it."""
    last = raised.traceback[-1]
    return f"{last.name} ({Path(last.path).name}:{last.lineno + 1})"


def first_line(text: str) -> str:
    """Returns the first line of a message, cut to what fits into a table cell."""
    line = printable(text).strip().partition("\n")[0]
    return line if len(line) <= _REASON_CHARS else f"{line[: _REASON_CHARS - 1]}…"


def make_printable(report: pytest.TestReport) -> None:
    """Replaces what no UTF-8 writer takes: one such text would end the session of all workers."""
    texts = [report.longreprtext, *(text for _, text in report.sections)]
    if any(printable(text) != text for text in texts):
        if report.longrepr is not None:
            report.longrepr = printable(report.longreprtext)
        report.sections = [(name, printable(text)) for name, text in report.sections]


def refuse_swallowed_timeout(item: pytest.Item, report: pytest.TestReport) -> None:
    """Fails a call that went on after its time was up, having caught what should have ended it."""
    limit = own_limit(item)
    if report.when != "call" or not report.passed or limit is None:
        return
    # As pytest-timeout counts: from before the setup, unless the marker says the function only.
    mark = item.get_closest_marker("timeout")
    is_whole = STARTED in item.stash and not (mark and mark.kwargs.get("func_only"))
    ran = time.monotonic() - item.stash[STARTED] if is_whole else report.duration
    if ran > limit:
        report.outcome = "failed"
        sentence = f"caught its timeout of {limit:g} s and ran for {ran:.1f} s"
        report.longrepr = sentence
        report.forge_raised = ["timeout", sentence]  # type: ignore[attr-defined]


@dataclass(slots=True)
class Attempt:
    """The phases of one attempt at an item."""

    outcomes: dict[str, str] = field(default_factory=dict)
    """Phase -> report outcome."""
    raised: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Phase -> (kind, reason)."""
    xfail: str | None = None
    is_xpass: bool = False
    """Whether it passed although its own marker says xfail."""
    subtest: str | None = None
    """Reason of the first failed subtest."""
    skipped_subtest: str | None = None
    """Reason of the first subtest that was skipped."""
    log: str | None = None
    duration_s: float = 0.0
    calls: int = 1
    """How often the item was called up to the last phase."""
    earlier_calls: int = 0
    """Those of attempts that were reported by themselves (pytest-rerunfailures)."""
    evidence: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Python warnings up to the last phase, a line each."""

    def add(self, report: pytest.TestReport) -> None:
        """Takes one phase."""
        raised = getattr(report, "forge_raised", None)
        self.duration_s += float(report.duration)
        self.calls = max(self.calls, getattr(report, "forge_calls", 1))
        self.warnings = getattr(report, "forge_warnings", self.warnings)
        if report.failed:
            self.log = tail(report.longreprtext)
        # Subtests report their own phases before the item's call.
        if hasattr(report, "context"):
            self._add_subtest(report, *(raised or ("", "")))
            return
        self.outcomes[report.when or ""] = report.outcome
        if raised is not None:
            self.raised[report.when or ""] = (raised[0], raised[1])
        if hasattr(report, "wasxfail"):
            self.xfail = str(report.wasxfail)
            self.is_xpass = report.passed
        elif report.failed and str(report.longrepr).startswith(_STRICT_XPASS):
            self.raised["call"] = ("assertion", _passed_marked_xfail(str(report.longrepr)))
        self.evidence = [v for k, v in report.user_properties if k == EVIDENCE_KEY]  # type: ignore[misc]

    def failed(self, phase: str) -> bool:
        """Returns whether a phase failed, also where a plugin then reported something else.

        Plugins that retry within a phase leave what the first call raised beside the report of
        the last: there the number of calls tells.
        """
        outcome = self.outcomes.get(phase)
        is_retried_within = self.calls - self.earlier_calls > 1
        if outcome not in ("passed", "skipped") or is_retried_within:
            return outcome == "failed"
        return self.raised.get(phase, ("", ""))[0] in _FAILURES

    def _add_subtest(self, report: pytest.TestReport, kind: str, reason: str) -> None:
        if report.failed and self.subtest is None:
            self.subtest = reason or "a subtest failed"
        elif kind == "xfail" or hasattr(report, "wasxfail"):
            self.xfail = self.xfail or reason or str(getattr(report, "wasxfail", ""))
        elif report.skipped and kind != "not_applicable" and self.skipped_subtest is None:
            self.skipped_subtest = f"a subtest was skipped: {reason or 'no reason given'}"


def tail(text: str) -> str | None:
    """Returns the end of a failure text, where pytest puts the error itself."""
    text = printable(text).strip()
    return text[-_LOG_CHARS:] or None


def judge(attempt: Attempt) -> tuple[Outcome, str]:
    """Returns outcome and reason of an attempt, before retries and waivers."""
    if attempt.xfail is not None:
        # A known failure is a waiver with owner and expiry; the mark has neither.
        why = attempt.xfail.removeprefix("reason: ").strip() or "no reason given"
        if attempt.is_xpass:
            return Outcome.FAIL, _passed_marked_xfail(why)
        return Outcome.FAIL, first_line(f"xfail without a waiver: {why}")
    phases = ("setup", "call", "teardown")
    for phase in phases:
        if attempt.failed(phase):
            return _failed(attempt, phase)
    if attempt.subtest is not None:
        return Outcome.FAIL, attempt.subtest
    for phase in phases:
        if attempt.outcomes.get(phase) == "skipped":
            kind, reason = attempt.raised.get(phase, ("skip", "skipped"))
            na = kind == "not_applicable"
            return (Outcome.NOT_APPLICABLE if na else Outcome.NOT_MEASURED), reason or "skipped"
    judged = _passed(attempt.evidence)
    if judged[0] is not Outcome.FAIL and (left_out := _left_out(attempt)):
        return Outcome.NOT_MEASURED, left_out
    return judged


def _left_out(attempt: Attempt) -> str | None:
    """Returns what of an item that did not fail was not run, if anything."""
    if "call" not in attempt.outcomes:
        # Evidence of a fixture says nothing of the test (--setup-only).
        return "its fixtures were set up, the test itself was not run"
    return attempt.skipped_subtest


def _passed_marked_xfail(why: str) -> str:
    why = why.removeprefix(_STRICT_XPASS).strip() or "no reason given"
    return first_line(f"passed although its marker says xfail: {why}")


def _failed(attempt: Attempt, phase: str) -> tuple[Outcome, str]:
    kind, reason = attempt.raised.get(phase, ("assertion", "failed"))
    if (reported := attempt.outcomes[phase]) != "failed":
        reason = first_line(f"{reason} (reported as {reported} by another plugin)")
    if phase == "call" and attempt.subtest is not None:
        return Outcome.FAIL, attempt.subtest
    if phase == "call" and kind == "assertion":
        return Outcome.FAIL, reason
    return Outcome.ERROR, reason if phase == "call" else f"{phase}: {reason}"


def _passed(evidence: list[dict[str, Any]]) -> tuple[Outcome, str]:
    from forge_harness.evidence import Evidence

    values = [Evidence(**value) for value in evidence]
    if not values:
        return Outcome.NOT_MEASURED, "passed without recording evidence"
    missed = [value for value in values if not value.ok()]
    # A check that catches EvidenceFailure does not turn a missed limit green.
    failed = [value for value in missed if value.level == Level.FAIL]
    if failed:
        return Outcome.FAIL, first_line(failed[0].sentence())
    if missed:
        return Outcome.WARN, first_line(missed[0].sentence())
    return Outcome.PASS, ""


def item_record(nodeid: str, check: str, attempt: Attempt, attempts: int = 1) -> ItemRecord:
    """Returns the record of an item whose last attempt is `attempt`."""
    from forge_harness.record import EvidenceRecord, ItemRecord

    outcome, reason = judge(attempt)
    if attempts > 1 and outcome in {Outcome.PASS, Outcome.WARN}:
        outcome = Outcome.FLAKY
        reason = f"passed on attempt {attempts}" + (f"; {reason}" if reason else "")
    return ItemRecord(
        nodeid=nodeid,
        check=check,
        outcome=outcome,
        reason=reason,
        duration_s=round(attempt.duration_s, 6),
        attempts=attempts,
        evidence=[EvidenceRecord(item=nodeid, **value) for value in attempt.evidence],
        log=attempt.log,
        warnings=attempt.warnings,
    )
