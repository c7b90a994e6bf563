"""Work done once for all processes of a session."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from forge_harness.errors import ForgeError

TURN, ROOM = "timing.turn", "timing.room"
PATIENCE_S = 900.0
"""What a test that compares times waits for the others, before it runs beside them."""
POLL_S = 0.01


class SharedBuildError(ForgeError):
    """Work that several checks share failed; each of them ends with the same reason."""


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keeps other processes of the session out of such blocks, and of `alongside`, meanwhile.

    Who waits is next: those that come later wait behind it, so that a stream of short blocks in
    the other processes does not keep it out. It waits for `PATIENCE_S` at most: the others may wait
    for something that one of those behind it holds.
    """
    with (
        _locked(directory / TURN, fcntl.LOCK_EX),
        _locked(directory / ROOM, fcntl.LOCK_EX, patience=PATIENCE_S),
    ):
        yield


@contextmanager
def alongside(directory: Path) -> Iterator[None]:
    """Runs beside other such blocks in other processes, and beside none that is `alone`."""
    with ExitStack() as room:
        with _locked(directory / TURN, fcntl.LOCK_EX):
            room.enter_context(_locked(directory / ROOM, fcntl.LOCK_SH))
        yield


@contextmanager
def _locked(file: Path, kind: int, *, patience: float | None = None) -> Iterator[None]:
    """Holds a POSIX lock: unlike flock's, a child that a check forked and left does not keep it.

    With `patience`, in seconds, it goes on without the lock after that.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with file.open("a+") as lock:
        if patience is None:
            fcntl.lockf(lock, kind)
        else:
            _lock_within(patience, lock, kind)
        yield


def _lock_within(patience: float, lock: IO[str], kind: int) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            fcntl.lockf(lock, kind | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            time.sleep(POLL_S)


def build_once(directory: Path, name: str, builder: Callable[[], Any]) -> Any:  # noqa: ANN401
    """Returns what `builder` returned in the first process that got here, as JSON values.

    The others wait for it. A builder that raised is not tried again: the work may take minutes
    and would fail each check by its own timeout instead of by the reason.

    Args:
        directory: The same in all processes of the session.
        name: Letters, digits, dash, dot and underscore.
        builder: Its result must survive JSON.

    Raises:
        SharedBuildError: The builder raised, here or in another process.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f"shared build {name!r}: use letters, digits, '-', '.' and '_'")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = directory / f"build-{name}.json"
    with (directory / f"build-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _write(target, _attempt(builder))
    document = json.loads(target.read_text(encoding="utf-8"))
    if "error" in document:
        raise SharedBuildError(f"{name} could not be built: {document['error']}")
    return document["result"]


def _attempt(builder: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"result": builder()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _write(target: Path, document: dict[str, Any]) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text(json.dumps(document), encoding="utf-8")
    partial.replace(target)
