"""One process a directory: the lock is on the directory itself, so no file is left in it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from forge_harness.cli.terminal import say
from forge_harness.errors import UsageError
from forge_harness.forks import Lockable


@contextmanager
def training_into(path: Path) -> Iterator[None]:
    """Makes a directory where there is none, and keeps other trainings out of it meanwhile.

    One that was made here and is still empty at the end is removed again.

    Raises:
        UsageError: It is a file, cannot be made or written, or another process trains into it.
    """
    made: list[Path] = []
    try:
        if path.exists() and not path.is_dir():
            raise UsageError(f"{str(path)!r} is a file; give a new directory.")
        made = _make(path)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(None, "it may not be written")
        held = Lockable(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
    except OSError as error:
        _remove_empty(made)
        raise UsageError(
            f"Cannot train into {str(path)!r} ({error.strerror}); choose another directory."
        ) from error
    try:
        _lock(held.descriptor, path)
        try:
            yield
        finally:
            _remove_empty(made)
    finally:
        held.close()


@contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Waits until no other process writes reports into a run, and keeps others out meanwhile.

    Of two at once each would seal what the other is about to replace. Does nothing where there is
    no directory, or the file system has no locks. Whoever holds one run must not wait for another.
    """
    with _locked(path, fcntl.LOCK_EX):
        yield


@contextmanager
def unwritten(path: Path) -> Iterator[None]:
    """Waits until no other process writes reports into a run, and keeps writers out meanwhile.

    Between the first new report and the new manifest a run does not verify, and is sound all the
    same. Any number read at once; otherwise as `alone_in`.
    """
    with _locked(path, fcntl.LOCK_SH):
        yield


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    try:
        held = Lockable(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
    except OSError:
        yield  # whoever reads the run says what is wrong with it
        return
    try:
        _wait(held.descriptor, how, path)
        yield
    finally:
        held.close()


def _wait(held: int, how: int, path: Path) -> None:
    with suppress(OSError):  # A file system without locks has nothing to wait for.
        try:
            fcntl.flock(held, how | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Waiting: another process reads the run in {path}, or writes reports into it.")
            fcntl.flock(held, how)


def _make(path: Path) -> list[Path]:
    """Makes a directory and its parents; returns those that were not there, deepest first."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(made: list[Path]) -> None:
    with suppress(OSError):  # One that is not empty ends it.
        for path in made:
            path.rmdir()


def _lock(held: int, path: Path) -> None:
    taken = f"Another process is training into {str(path)!r}; wait for it, or give a new directory."
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(taken) from None
    except OSError:
        # A file system without locks (some network ones); whoever comes later than a moment after
        # the first is still refused, since the directory is no longer empty.
        return
    # The one before may have removed what it had made, between our opening and our locking.
    if not path.exists() or not os.path.samestat(os.fstat(held), path.stat()):
        raise UsageError(taken)
