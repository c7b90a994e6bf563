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
    """`run_timed(check_id, subject=None)` runs a check of speed while no other worker runs a test.

    And again where the machine was too noisy for it still: then there is nothing to hold.
    """

    def run(check, subject=None):
        for _ in range(3):
            found = run_check(check, subject)
            if found.outcome != "not_measured" or "quieter machine" not in found.reason:
                return found
        pytest.skip(f"{check} cannot tell, three times: {found.reason}")

    return run


def pytest_collection_modifyitems(items):
    for item in items:
        if "run_timed" in getattr(item, "fixturenames", ()):
            item.add_marker("forge_timing")
