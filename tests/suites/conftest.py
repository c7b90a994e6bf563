"""Runs one check against a sabotaged subject."""

from __future__ import annotations

import pytest

from forge_harness._pytest import inprocess


@pytest.fixture
def run_check():
    """`run_check(check_id, subject=None, *, config=None, study=None, ...) -> CheckRun`."""
    return inprocess.run_check


@pytest.fixture
def run_timed(run_check):
    """`run_timed(check_id)` runs a check of speed again where the machine was too noisy for it.

    The other worker of this session is such noise: then there is nothing to hold.
    """

    def run(check):
        for _ in range(3):
            found = run_check(check)
            if found.outcome != "not_measured" or "quieter machine" not in found.reason:
                return found
        pytest.skip(f"{check} cannot tell, three times: {found.reason}")

    return run
