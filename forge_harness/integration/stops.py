"""Requests to stop: the first ends the checks of a run, none the writing of its record.

A CI system cancels a job by one signal after the other, seconds apart, and a closed terminal
sends one too; by then the run may be writing what it measured.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

STOPS = tuple(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_PAUSE_S = 0.01


@contextlib.contextmanager
def interrupted_once() -> Iterator[None]:
    """Ends the block with KeyboardInterrupt on the first stop signal; later ones do nothing.

    They would fall into the clean-up that the first one caused. One that Python ignored, raised in
    a destructor or in a weak reference's callback, is raised again. One that came while an
    `uninterrupted` around the block waited for it ends it before it begins. Does nothing off the
    main thread, where no handler can be set.
    """
    waiting = _waiting()
    came: int | None = None
    over = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came is None:
            came = number
            raise KeyboardInterrupt

    def ignored() -> None:
        nonlocal came
        number, came = came, None
        if number is not None:
            # Not by `threading`: the destructor may have been called while it held its own lock.
            _thread.start_new_thread(_send_again, (number, over))

    with _handled_by(interrupt), _ignored_interrupts(ignored):
        try:
            if waiting is not None and (earlier := waiting.take()) is not None:
                interrupt(earlier, None)
            yield
        finally:
            over.set()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets stop signals do nothing in the block, except to the next `interrupted_once` in it."""
    with _handled_by(_waiting() or _Waiting()):
        yield


@contextlib.contextmanager
def delayed() -> Iterator[None]:
    """Lets stop signals wait for the end of the block, which nothing may be lost in."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    try:
        with _handled_by(note):
            yield
    finally:
        for number in came[:1]:
            signal.raise_signal(number)


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


class _Waiting:
    """A handler that lets a signal do nothing, and knows that it came.

    Not SIG_IGN, which child processes would inherit.
    """

    def __init__(self) -> None:
        self.came: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = number

    def take(self) -> int | None:
        """Returns the signal that came, which is dealt with from here on."""
        number, self.came = self.came, None
        return number


def _waiting() -> _Waiting | None:
    """Returns the handler of an `uninterrupted` around the caller, if it is in one."""
    handlers = (signal.getsignal(number) for number in STOPS)
    return next((handler for handler in handlers if isinstance(handler, _Waiting)), None)


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


@contextlib.contextmanager
def _ignored_interrupts(ignored: Callable[[], None]) -> Iterator[None]:
    """Tells of each KeyboardInterrupt in the block that was raised where nothing can catch it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            ignored()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _send_again(number: int, over: threading.Event) -> None:
    # From another thread and later: at once it would be raised, and ignored, in the same place.
    if not over.wait(_PAUSE_S):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
