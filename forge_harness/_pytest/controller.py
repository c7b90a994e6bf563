"""The process that sees all reports: collects records, keeps the run, prints the summary."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

from forge_harness._pytest.collector import Collector
from forge_harness._pytest.state import ForgeState
from forge_harness.errors import ForgeError

if TYPE_CHECKING:
    from forge_harness._pytest.keeper import Keeper
    from forge_harness.record import ItemRecord


class Controller:
    """Registered in every process but xdist's workers; does nothing where there are no checks."""

    def __init__(self, state: ForgeState) -> None:
        self.state = state
        self.collector = Collector(self._receive)
        self.keeper: Keeper | None = None
        self.internal_error: str | None = None
        self.problem: str | None = None
        self._lost_collections: list[pytest.CollectReport] = []
        self._session: pytest.Session | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Refuses bad options before anything runs, and starts the run directory."""
        self._session = session
        options = self.state.options
        if options.events is not None:
            from forge_harness.integration import lifeline

            lifeline.watch()
        if options.events is not None or self.state.handover is not None:
            return
        try:
            if options.subject is not None:
                _ = self.state.loaded
            if options.run_dir is not None:
                self._make_keeper().start()
        except ForgeError as error:
            raise pytest.UsageError(str(error)) from error

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Announces what will run; under xdist the workers do, see below."""
        if self.state.marks:
            self._announce()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:  # noqa: ANN401
        """Takes over what a worker collected, and refuses unknown names."""
        if self.state.marks:
            return
        self.state.adopt_collected()
        if not self.state.marks:
            return
        from forge_harness._pytest.collection import selection_problem

        problem = self.state.problem or selection_problem(self.state)
        if problem is not None:
            pytest.exit(problem, returncode=pytest.ExitCode.USAGE_ERROR)
        self._announce()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Says which item runs, so that a hung one can be named."""
        if self.state.options.events is not None:
            self._event("started", nodeid=nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Says that an item ended: of a test that is no check nothing else tells."""
        if self.state.options.events is not None:
            self._event("ended", nodeid=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes the report of one phase of one item."""
        self.collector.add(report, self.state.marks)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remembers a module that could not be imported, or skipped itself."""
        if report.failed or (report.skipped and self._defines_checks(report)):
            self._lost_collections.append(report)
            if self.state.options.events is not None:
                self._take_lost_collections()

    def pytest_internalerror(self, excrepr: object) -> None:
        """Remembers that pytest, or a worker, broke down."""
        lines = str(excrepr).strip().splitlines()
        self.internal_error = self.internal_error or (lines[-1].strip() if lines else "unknown")

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(
        self, session: pytest.Session, exitstatus: int
    ) -> Generator[None, object, object]:
        """Ends the run, also where a second Ctrl-C ends what other plugins do before."""
        try:
            return (yield)
        finally:
            self._close(session, exitstatus)

    def _close(self, session: pytest.Session, exitstatus: int) -> None:
        """Accounts for every collected item, then ends the run."""
        self.state.adopt_collected()
        if int(exitstatus) == pytest.ExitCode.USAGE_ERROR:
            return
        if not self.state.marks and self.keeper is None and self.state.options.events is None:
            return
        self._take_lost_collections()
        reason = self._why_lost(session, exitstatus)
        lost = self.collector.close(self.state.marks, reason)
        if self.state.handover is not None:
            return
        if self.state.options.events is not None:
            self._event(
                "finished",
                exitstatus=int(exitstatus),
                error=self.internal_error,
                lost=lost,
                reason=reason,
            )
            return
        from forge_harness.integration.stops import uninterrupted

        try:
            with uninterrupted():
                self._end(exitstatus, lost, reason)
        except ForgeError as error:
            self.problem = str(error)
            session.exitstatus = int(error.exit_code)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Prints score, coverage and verdict."""
        if self.problem is not None:
            terminalreporter.write_line(f"forge-harness: {self.problem}", red=True)
        if self.keeper is not None and self.keeper.record is not None:
            from forge_harness._pytest.summary import write_summary

            write_summary(terminalreporter, self.keeper)

    def pytest_unconfigure(self) -> None:
        """Removes what the processes of the session shared."""
        shutil.rmtree(self.state.shared, ignore_errors=True)

    def _end(self, exitstatus: int, lost: int, reason: str) -> None:
        keeper = self._make_keeper()
        for records in self.collector.records.values():
            for record in records:
                keeper.add(record)
        if self.internal_error is not None:
            keeper.finish("aborted", reason)
        elif uncollected := self._uncollected():
            keeper.finish("aborted", uncollected)
        elif int(exitstatus) == pytest.ExitCode.INTERRUPTED:
            keeper.finish("interrupted", "interrupted")
        elif lost:
            keeper.finish("aborted", f"{lost} collected test(s) did not run: {reason}")
        else:
            keeper.finish("finished")

    def _why_lost(self, session: pytest.Session, exitstatus: int) -> str:
        if self.internal_error is not None:
            return f"pytest broke down: {self.internal_error}"
        stopped = session.shouldfail or session.shouldstop
        if stopped:
            return str(stopped)
        if int(exitstatus) == pytest.ExitCode.INTERRUPTED:
            # For pytest a module that cannot be imported is an interruption too.
            return self._uncollected() or "the run was interrupted"
        if session.config.option.collectonly:
            return "only collected (--collect-only)"
        return "collected, but never reported: the process that was to run it lost it"

    def _uncollected(self) -> str:
        """Returns how many modules could not be collected, as a clause; empty when all could."""
        count = len(self.collector.collection_errors)
        return f"{count} module(s) could not be collected" if count else ""

    def _receive(self, record: ItemRecord) -> None:
        if self.state.handover is not None:
            self.state.handover.records.append(record)
        elif self.state.options.events is not None:
            self._event("item", record=record.model_dump(mode="json"))
        elif self.keeper is not None:
            self.keeper.add(record)
            if self.keeper.disk_full is not None and self._session is not None:
                self._session.shouldstop = self.keeper.disk_full

    def _take_lost_collections(self) -> None:
        for report in self._lost_collections:
            if report.skipped:
                self.collector.add_skipped_module(report)
            else:
                self.collector.add_collection(report)
        self._lost_collections.clear()

    def _defines_checks(self, report: pytest.CollectReport) -> bool:
        """Whether a module that skipped itself may hold checks.

        All that `forge-harness run` collects may; in a pytest session of a user's that is what
        names the marker, as other tests are none of our business.
        """
        if self.state.options.events is not None:
            return True
        path = self.state.config.rootpath / report.nodeid.partition("::")[0]
        try:
            return b"forge_check" in path.read_bytes()
        except OSError:
            return True

    def _make_keeper(self) -> Keeper:
        if self.keeper is None:
            from forge_harness._pytest.keeper import Keeper

            self.keeper = Keeper(self.state)
        return self.keeper

    def _announce(self) -> None:
        if self.state.options.events is not None:
            marks = {nodeid: mark.to_json() for nodeid, mark in self.state.marks.items()}
            self._event("collected", marks=marks)

    def _event(self, kind: str, **content: object) -> None:
        events = self.state.options.events
        assert events is not None
        line = json.dumps({"event": kind, **content}, allow_nan=False)
        with events.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")
