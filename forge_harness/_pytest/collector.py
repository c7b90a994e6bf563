"""Collects the items' records from the reports, in the process that sees all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pytest

from forge_harness._pytest.marks import CheckMark
from forge_harness._pytest.outcomes import Attempt, first_line, item_record, tail
from forge_harness.probes.masking import Masker
from forge_harness.types import UNKNOWN_CHECK, Outcome

if TYPE_CHECKING:
    from forge_harness.record import ItemRecord

Receiver = Callable[["ItemRecord"], None]
_Turn = tuple[str, str]
"""Node id and worker: of xdist's `--dist each` every worker runs every item."""


class Collector:
    """Turns reports into `ItemRecord`s, handed on when the last phase is in.

    Evidence is complete at teardown, which is reported even when setup failed. A worker that
    dies reports phase "???" and nothing after it (xdist 3.8).
    """

    def __init__(self, receive: Receiver) -> None:
        self._receive = receive
        self._attempts: dict[_Turn, Attempt] = {}
        self._retries: dict[_Turn, int] = {}
        self._retried: set[_Turn] = set()
        self._retried_calls: dict[_Turn, int] = {}
        self._checks: dict[str, str] = {}
        self._masker = Masker()
        self.records: dict[str, list[ItemRecord]] = {}
        self.collection_errors: dict[str, str] = {}
        self._skipped_modules: set[str] = set()

    def add(self, report: pytest.TestReport, marks: Mapping[str, CheckMark]) -> None:
        """Takes the report of one phase."""
        nodeid = report.nodeid
        check = getattr(report, "forge_check", None)
        if check is not None:
            self._checks[nodeid] = check
        if report.when == "???":  # type: ignore[comparison-overlap]
            self._crashed(report, marks)
            return
        if check is None:
            if report.failed:
                self._failed_test_without_check(report)
            return
        if self._is_being_retried(report):
            return
        turn = _turn(report)
        earlier = self._retried_calls.get(turn, 0)
        attempt = self._attempts.setdefault(turn, Attempt(earlier_calls=earlier))
        attempt.add(report)
        if report.when == "teardown":
            self._finish(turn, attempt)

    def _is_being_retried(self, report: pytest.TestReport) -> bool:
        """Counts retries (pytest-rerunfailures), and drops what an earlier attempt reports.

        The phase that failed has the outcome "rerun"; its teardown may follow (16.x) or not.
        """
        turn = _turn(report)
        if report.when == "setup":
            self._retried.discard(turn)
        if report.outcome == "rerun" and turn not in self._retried:  # type: ignore[comparison-overlap]
            self._retried.add(turn)
            self._retries[turn] = self._retries.get(turn, 0) + 1
            self._retried_calls[turn] = getattr(report, "forge_calls", 0)
            self._attempts.pop(turn, None)
        return turn in self._retried

    def add_collection(self, report: pytest.CollectReport) -> None:
        """Takes a module that could not be imported: whatever it holds is lost, and that shows."""
        if not report.failed or report.nodeid in self.collection_errors:
            return
        text = (report.longreprtext.strip() or "no reason given").splitlines()
        reason = first_line(f"could not be collected: {text[-1].removeprefix('E').strip()}")
        self.collection_errors[report.nodeid] = reason
        self._give(_bare(report.nodeid, UNKNOWN_CHECK, Outcome.ERROR, reason, report.longreprtext))

    def add_skipped_module(self, report: pytest.CollectReport) -> None:
        """Takes a module that skipped itself: what it checks is unknown, and not measured."""
        if report.nodeid in self._skipped_modules:
            return
        self._skipped_modules.add(report.nodeid)
        # Path, line and message, as pytest reports a skip.
        why = report.longrepr[2] if isinstance(report.longrepr, (tuple, list)) else ""
        reason = first_line(f"skipped itself whole: {why.removeprefix('Skipped: ')}")
        self._give(_bare(report.nodeid, UNKNOWN_CHECK, Outcome.NOT_MEASURED, reason))

    def close(self, marks: Mapping[str, CheckMark], reason: str) -> int:
        """Records as not measured what was collected and never reported; returns how many.

        Without this a check of several items would be judged by those that happened to run.
        """
        lost = 0
        for nodeid, mark in sorted(marks.items()):
            if nodeid in self.records:
                continue
            why = "deselected by an option of pytest" if mark.dropped else reason
            lost += not mark.dropped
            self._give(_bare(nodeid, mark.check, Outcome.NOT_MEASURED, why))
        return lost

    def _finish(self, turn: _Turn, attempt: Attempt) -> None:
        # A plugin that retries inside one phase reports it once: then only the calls tell.
        attempts = max(self._retries.get(turn, 0) + 1, attempt.calls)
        del self._attempts[turn]
        nodeid, _ = turn
        self._give(item_record(nodeid, self._checks[nodeid], attempt, attempts))

    def _crashed(self, report: pytest.TestReport, marks: Mapping[str, CheckMark]) -> None:
        mark = marks.get(report.nodeid)
        check = mark.check if mark is not None else self._checks.get(report.nodeid, UNKNOWN_CHECK)
        reason = "the process running it died (crash, or killed for memory)"
        self._attempts.pop(_turn(report), None)
        self._give(_bare(report.nodeid, check, Outcome.ERROR, reason, report.longreprtext))

    def _failed_test_without_check(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.records:
            return
        raised = getattr(report, "forge_raised", None)
        reason = first_line(f"test without a forge_check marker failed: {(raised or ('', ''))[1]}")
        self._give(_bare(report.nodeid, UNKNOWN_CHECK, Outcome.ERROR, reason, report.longreprtext))

    def _give(self, record: ItemRecord) -> None:
        record = _without_credentials(record, self._masker)
        self.records.setdefault(record.nodeid, []).append(record)
        self._receive(record)


def _turn(report: pytest.TestReport) -> _Turn:
    node = getattr(report, "node", None)
    return report.nodeid, "" if node is None else node.gateway.id


def _bare(nodeid: str, check: str, outcome: Outcome, reason: str, log: str = "") -> ItemRecord:
    from forge_harness.record import ItemRecord

    return ItemRecord(
        nodeid=nodeid, check=check, outcome=outcome, reason=reason, duration_s=0.0, log=tail(log)
    )


def _without_credentials(record: ItemRecord, masker: Masker) -> ItemRecord:
    evidence = [
        value.model_copy(
            update={
                "reason": masker.text(value.reason),
                "value": masker.text(value.value) if isinstance(value.value, str) else value.value,
                "limit": masker.text(value.limit) if isinstance(value.limit, str) else value.limit,
            }
        )
        for value in record.evidence
    ]
    log = None if record.log is None else masker.text(record.log)
    update = {
        "reason": masker.text(record.reason),
        "log": log,
        "warnings": [masker.text(warning) for warning in record.warnings],
        "evidence": evidence,
    }
    return record.model_copy(update=update)
