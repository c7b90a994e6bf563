"""Requests to stop: the first ends the checks of a run, none the writing of its record.

A CI system cancels a job by one signal after the other, seconds apart, and a closed terminal
sends one too; by then the run may be writing what it measured.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

STOPS = tuple(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


@contextlib.contextmanager
def interrupted_once() -> Iterator[None]:
    """Ends the block with KeyboardInterrupt on the first stop signal; later ones do nothing.

    They would fall into the clean-up that the first one caused. Does nothing off the main thread,
    where no handler can be set.
    """
    came = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if not came:
            came = True
            raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets stop signals do nothing in the block, except where `interrupted_once` is in it."""

    # Not SIG_IGN, which child processes would inherit.
    def wait(number: int, frame: FrameType | None) -> None:
        pass

    with _handled_by(wait):
        yield


@contextlib.contextmanager
def interrupted_like_sigint() -> Iterator[None]:
    """Makes a KeyboardInterrupt of the first stop signal that would end the process unheard.

    So that what the block has begun is cleaned up. A second one ends the process at once, and so
    does the first in a child of fork. Signals that somebody handles are left to them.
    """
    unhandled = [number for number in STOPS if signal.getsignal(number) is signal.SIG_DFL]
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in unhandled:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != owner:
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt

    with _handled_by(interrupt, unhandled):
        yield


@contextlib.contextmanager
def _handled_by(
    handler: Callable[[int, FrameType | None], None], numbers: Iterable[signal.Signals] = STOPS
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A signal that is ignored stays so: nohup, and a shell's background jobs, mean it.
    before = {
        number: signal.getsignal(number)
        for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            # None: a handler that was not set by Python, and cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
