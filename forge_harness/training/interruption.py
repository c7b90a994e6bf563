"""Signals that stop a training between two steps, and how it ends then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from forge_harness.errors import ExitCode, ForgeError


class TrainingInterrupted(ForgeError):
    """The run was stopped between two steps and can be resumed."""

    exit_code = ExitCode.INTERRUPTED


@contextmanager
def signals_noted() -> Iterator[threading.Event]:
    """Turns the first SIGINT, SIGTERM or SIGHUP into an event, so that no step is cut in half."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    numbers = [signal.Signals[n] for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    # None: a handler that was not set by Python, and cannot be set again from here. One that is
    # ignored stays so: nohup, and a shell's background jobs, mean it.
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
    before = {n: handler for n, handler in before.items() if handler is not signal.SIG_IGN}

    def note(number: int, _: object) -> None:
        noted.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
