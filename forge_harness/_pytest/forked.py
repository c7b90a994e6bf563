"""Ends a child that a check forked and let go on: it would be a second session of the same run."""

from __future__ import annotations

import os

import pytest

from forge_harness._pytest.state import ForgeState


class EndingForks:
    """Plugin of each process that runs checks.

    A child whose code raises or returns runs all checks that are left, writes into the run
    directory, or into its parent's channel to xdist. Where one is meant to report (pytest-forked)
    it reports to its parent, not here.
    """

    def __init__(self, state: ForgeState) -> None:
        self._state = state
        self._owner = os.getpid()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Ends the child with the status of a failure before anybody hears of the report."""
        if os.getpid() == self._owner or not self._state.marks:
            return
        sentence = f"forge-harness: ended a child that {report.nodeid} forked and let go on\n"
        os.write(2, sentence.encode("utf-8", "backslashreplace"))
        os._exit(1)
