"""Fixtures of all tests."""

from __future__ import annotations

import signal

pytest_plugins = ["pytester"]


def pytest_configure():
    # A shell starts background jobs with SIGINT ignored, and children inherit it: the processes
    # that tests interrupt would never notice.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
