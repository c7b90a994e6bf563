"""Fixtures of all tests."""

from __future__ import annotations

import gc
import signal
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

# Examples that train, convert or write files take as long as the machine is busy: neither the time
# of one (deadline) nor that of making them (too_slow) says that anything is wrong.
settings.register_profile("harness", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("harness")

pytest_plugins = ["pytester"]


def pytest_configure():
    # A shell starts background jobs with SIGINT ignored and nohup its command with SIGHUP, and
    # children inherit it: the processes that tests interrupt would never notice.
    for which, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(which) == signal.SIG_IGN:
            signal.signal(which, usual)


def pytest_collection_finish():
    # Seven hundred thousand objects of modules and tests, which no collection can free: looking
    # through them again and again took 5 % of the time of tests that run a check in the process.
    gc.collect()
    gc.freeze()


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
