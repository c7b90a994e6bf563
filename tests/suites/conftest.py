"""Runs one check against a sabotaged subject."""

from __future__ import annotations

import pytest

from forge_harness._pytest import inprocess


@pytest.fixture
def run_check():
    """`run_check(check_id, subject=None, *, config=None, study=None, ...) -> CheckRun`."""
    return inprocess.run_check
