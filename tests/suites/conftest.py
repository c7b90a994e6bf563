"""Runs one check against a sabotaged subject."""

from __future__ import annotations

from functools import cache

import pytest

from forge_harness._pytest import inprocess


@pytest.fixture
def run_check():
    """`run_check(check_id, subject=None, *, config=None, study=None, ...) -> CheckRun`."""
    return inprocess.run_check


@pytest.fixture(scope="session")
def _served():
    """What the reference subject's servers are made of, each part made once."""
    from forge_harness.subject import serving

    return {name: cache(getattr(serving, name)) for name in ("_trained", "greedy", "special")}


@pytest.fixture
def trained_once(monkeypatch, _served):
    """For tests whose defect is in the server: the models behind it are not trained for each.

    They and their answers depend on nothing but the task; packages, keys, certificates and the
    server's process are made anew.
    """
    from forge_harness.subject import serving

    for name, part in _served.items():
        monkeypatch.setattr(serving, name, part)
