"""Runs tasks side by side, each in a process of its own that starts with torch imported.

A seeded defect may change its process for good, hang it or end it; its neighbours must not
notice. Forking from a server that has imported everything, and computed nothing, costs 10 ms
where a new interpreter takes 2.5 s until torch is there.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from forge_harness.integration.child import scrubbed_environment
from forge_harness.probes.masking import Masker

_POLL_S = 0.5
_TAIL = 2000


@dataclass(frozen=True, slots=True)
class Ended:
    """How a task ended: with a value, or with a problem."""

    index: int
    """Of the task in the sequence."""
    value: Any
    problem: str
    """Empty when there is a value."""
    seconds: float


@dataclass(slots=True)
class _Running:
    index: int
    process: ForkServerProcess
    result: Connection
    lifeline: Connection
    log: Path
    started: float


def side_by_side(
    work: Callable[[Any], Any],
    tasks: Sequence[Any],
    *,
    jobs: int,
    timeout_s: float,
    preload: Sequence[str],
) -> Iterator[Ended]:
    """Yields how each task ended, as they end.

    Args:
        work: Module-level function; called with one task in a process of its own.
        tasks: What can be pickled.
        jobs: Processes at a time.
        timeout_s: Longest time a task may take.
        preload: Modules the server imports before it forks.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, *preload])
    waiting = list(enumerate(tasks))[::-1]
    running: list[_Running] = []
    with tempfile.TemporaryDirectory(prefix="forge-drill-") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    index, task = waiting.pop()
                    log = Path(folder) / f"{index}.log"
                    running.append(_started(context, work, index, task, log))
                handles = [(one.result, one.process.sentinel) for one in running]
                wait([handle for pair in handles for handle in pair], timeout=_POLL_S)
                for one in list(running):
                    ended = _ended(one, timeout_s)
                    if ended is not None:
                        running.remove(one)
                        yield ended
        finally:
            for one in running:
                _end(one)


def _started(
    context: Any,  # noqa: ANN401 - multiprocessing's contexts have no public type
    work: Callable[[Any], Any],
    index: int,
    task: Any,  # noqa: ANN401 - whatever `work` takes
    log: Path,
) -> _Running:
    theirs: Connection
    result, theirs = context.Pipe(duplex=False)
    watched, lifeline = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(work, task, theirs, watched, str(log)))
    process.start()
    theirs.close()
    watched.close()
    return _Running(index, process, result, lifeline, log, time.monotonic())


def _ended(one: _Running, timeout_s: float) -> Ended | None:
    """Returns how a task ended, None while it runs; ends it when its time is over."""
    seconds = time.monotonic() - one.started
    value, problem = None, ""
    # In this order: an answer may be sent between the two questions, and is then read.
    is_dead = not one.process.is_alive()
    if one.result.poll():
        try:
            value, problem = one.result.recv()
        except EOFError:
            problem = _death(one)
    elif is_dead:
        # What it forked may hold the other end of the pipe: no end of file tells of its death.
        problem = _death(one)
    elif seconds > timeout_s:
        problem = f"took longer than {timeout_s:.0f} s"
    else:
        return None
    _end(one)
    return Ended(one.index, value, problem, seconds)


def _end(one: _Running) -> None:
    """Ends the process and what it started."""
    one.result.close()
    if one.process.pid is not None:
        # Also when it is dead: a group lives as long as one of its members, and keeps its id.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.kill()
    one.process.join()
    one.lifeline.close()


def _death(one: _Running) -> str:
    one.process.join()
    return f"the process ended with status {one.process.exitcode}{_last_line(one.log)}"


def _last_line(log: Path) -> str:
    with suppress(OSError):
        text = log.read_bytes()[-_TAIL:].decode("utf-8", "replace").strip()
        if text:
            return f" ({Masker().text(text.splitlines()[-1].strip())})"
    return ""


def _serve(
    work: Callable[[Any], Any],
    task: Any,  # noqa: ANN401 - whatever `work` takes
    result: Connection,
    lifeline: Connection,
    log: str,
) -> None:
    """Does one task in this process, in a session of its own, with its output in a file."""
    with suppress(OSError):
        os.setsid()
    threading.Thread(target=_watch, args=(lifeline,), daemon=True).start()
    _isolate(Path(log).parent)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(handle, stream)
    try:
        answer = (work(task), "")
    except BaseException as error:  # SystemExit too: a task that ends its process has no value.
        answer = (None, Masker().text(f"{type(error).__name__}: {error}"))
    with suppress(OSError):
        result.send(answer)
    sys.stdout.flush()
    # Left behind by what was drilled: threads that never end, exit handlers that raise.
    os._exit(0)


def _isolate(folder: Path) -> None:
    """Leaves temporary files where they go with the drill, and no options of the user's pytest."""
    kept = scrubbed_environment()
    for name in os.environ.keys() - kept.keys():
        del os.environ[name]
    os.environ.pop("PYTEST_DEBUG_TEMPROOT", None)
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(dir=folder)


def _watch(lifeline: Connection) -> None:
    """Ends this process and all it started when the one that asked for it is gone."""
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os.killpg(os.getpgrp(), signal.SIGKILL)
