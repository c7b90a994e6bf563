"""Children of fork, for tests of what they inherit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from forge_harness.errors import ForgeError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
with_threads = pytest.mark.filterwarnings("ignore:This process.* is multi-threaded")
"""Newer interpreters warn of a fork beside threads, which is what is tested."""


def forked(action: Callable[[], object], *, after: Callable[[], object] = lambda: None) -> str:
    """Runs something in a child of fork, once `after` was done here; returns what it came to."""
    receive, send = os.pipe()
    waiting, go = os.pipe()
    if (child := os.fork()) == 0:
        try:
            signal.alarm(20)  # One that waits for a thread it does not have ends all the same.
            os.read(waiting, 1)
            try:
                said = str(action())
            except ForgeError as error:
                said = f"{type(error).__name__}: {error}"
            os.write(send, said.encode())
        finally:
            os._exit(0)
    os.close(send)
    after()
    os.write(go, b"x")
    with os.fdopen(receive, "rb") as stream:
        said = stream.read().decode()
    os.waitpid(child, 0)
    os.close(waiting)
    os.close(go)
    return said


@contextmanager
def child_that_lives_on() -> Iterator[int]:
    """Forks a child that does nothing, as a data loader's idle worker; killed at the end."""
    if (child := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
