"""Fixtures of all tests."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# Examples that train, convert or write files take as long as the machine is busy: neither the time
# of one (deadline) nor that of making them (too_slow) says that anything is wrong.
settings.register_profile("harness", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("harness")

pytest_plugins = ["pytester"]


def pytest_configure():
    # A shell starts background jobs with SIGINT ignored, and children inherit it: the processes
    # that tests interrupt would never notice.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
