"""The store's lock: readers share it, one writer or collector has it alone.

It is a flock on the file `lock`, so it ends with the process that holds it, however that ends. What
is written into the file only says who to blame.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Self

from forge_harness.errors import StoreLockedError
from forge_harness.forks import Lockable

_LONGEST_WAIT_S = 0.02
"""Between two tries. A commit takes a few ms."""
PAUSE_S = 3 * _LONGEST_WAIT_S
"""For which a reader that takes the lock again and again leaves it alone, so that a writer's try
falls into it."""
TURN_S = 1.0
"""Seconds for which contents are read before whoever waits for the lock gets it."""


class StoreLock:
    """The lock of one store. Threads and processes are held off alike."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self.path = path
        self.timeout_s = timeout_s

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Keeps writers and collectors out while the block runs.

        Raises:
            StoreLockedError: It took longer than the timeout.
        """
        import fcntl

        try:
            # A pipe, which is no lock of ours, would be waited for otherwise.
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:  # A copy without its lock: nobody else can hold it.
            yield
            return
        with contextlib.closing(Lockable(handle)):
            self._acquire(handle, fcntl.LOCK_SH)
            yield

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keeps everybody else out while the block runs.

        Raises:
            StoreLockedError: It took longer than the timeout.
            OSError: The lock file cannot be made.
        """
        import fcntl

        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with contextlib.closing(Lockable(handle)):
            self._acquire(handle, fcntl.LOCK_EX)
            _leave_name(handle)
            yield

    def _acquire(self, handle: int, mode: int) -> None:
        import fcntl

        deadline, wait = time.monotonic() + self.timeout_s, 0.0005
        while True:
            try:
                fcntl.flock(handle, mode | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise StoreLockedError(
                        f"The state store at {self.path.parent} is locked by {self._holder()}; "
                        f"waited {self.timeout_s:g} s. Wait for it to end, or stop it."
                    ) from None
            except InterruptedError:
                continue
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_S)

    def _holder(self) -> str:
        """Who wrote last, when that process still lives; readers leave no name."""
        try:
            named = json.loads(self.path.read_bytes())
            alive = named["boot"] == _boot_id() and named["start"] == _start_time(named["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            alive = False
        return f"process {named['pid']}" if alive else "readers, or a process that left no name"


class Turns:
    """Holds the readers' lock, a turn at a time: no commit waits until gigabytes were read.

    Args:
        reading: Takes the lock.
    """

    def __init__(self, reading: Callable[[], AbstractContextManager[None]]) -> None:
        self._reading = reading
        self._held = ExitStack()
        self._end = 0.0
        self.is_held = False

    def __enter__(self) -> Self:
        self._take()
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def let_go(self) -> bool:
        """Lets go of the lock where the turn is over; returns whether it has been.

        For who has open what is read: its bytes stay, whatever becomes of its name.
        """
        if self.is_held and time.monotonic() >= self._end:
            self._held.close()
            self.is_held = False
        return not self.is_held

    def give_way(self) -> None:
        """Lets who waits for the lock have it where the turn is over, and begins another."""
        if time.monotonic() >= self._end:
            self._held.close()
            time.sleep(PAUSE_S)
            self._take()

    def _take(self) -> None:
        self._held.enter_context(self._reading())
        self.is_held, self._end = True, time.monotonic() + TURN_S


def _leave_name(handle: int) -> None:
    pid = os.getpid()
    record = json.dumps({"boot": _boot_id(), "pid": pid, "start": _start_time(pid)}).encode()
    # Only for the message of whoever waits: a full disk must not stop a reader of old content.
    with contextlib.suppress(OSError):
        if os.pread(handle, len(record) + 1, 0) != record:
            os.ftruncate(handle, 0)
            os.pwrite(handle, record, 0)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Clock ticks from boot to the start of a process; "" when there is no such process."""
    try:
        stat = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The second field is the program's name in parentheses and may hold anything.
    return stat.rpartition(")")[2].split()[19]
