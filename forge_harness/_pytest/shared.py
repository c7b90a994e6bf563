"""Work done once for all processes of a session."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from forge_harness.errors import ForgeError

TURN, ROOM = "timing.turn", "timing.room"


class SharedBuildError(ForgeError):
    """Work that several checks share failed; each of them ends with the same reason."""


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keeps other processes of the session out of such blocks, and of `alongside`, meanwhile.

    Who waits is next: those that come later wait behind it, so that a stream of short blocks in
    the other processes does not keep it out.
    """
    with _locked(directory / TURN, fcntl.LOCK_EX), _locked(directory / ROOM, fcntl.LOCK_EX):
        yield


@contextmanager
def alongside(directory: Path) -> Iterator[None]:
    """Runs beside other such blocks in other processes, and beside none that is `alone`."""
    with ExitStack() as room:
        with _locked(directory / TURN, fcntl.LOCK_EX):
            room.enter_context(_locked(directory / ROOM, fcntl.LOCK_SH))
        yield


@contextmanager
def _locked(file: Path, kind: int) -> Iterator[None]:
    """Holds a POSIX lock: unlike flock's, a child that a check forked and left does not keep it."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with file.open("a+") as lock:
        fcntl.lockf(lock, kind)
        yield


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
