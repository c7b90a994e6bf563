"""Campaign `writers`: two processes commit to one store at once, and are killed again and again."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from forge_harness.drill import children, scenes, workload
from forge_harness.drill.children import Session, session_of
from forge_harness.drill.tally import Finding, NotMeasured, Result, Tally
from forge_harness.drill.target import open_store
from forge_harness.errors import ConflictError

_PREFIXES = ("first-", "second-")
_ROUNDS = 100_000
_SHAPE = "mixed"
_BEFORE_KILL_S = (0.0, 0.15)
_START_S = 20.0

Step = Callable[[int, int, str], None]


def kill_writers(tally: Tally, opener: str, *, trials: int, tell: Step) -> None:
    """Lets two writers run side by side, kills both a moment apart, looks, and starts them again.

    Args:
        tally: Takes the findings.
        opener: What opens the store.
        trials: How often.
        tell: Progress.

    Raises:
        NotMeasured: Nothing was acknowledged, as by writers that wait for each other.
    """
    generator = random.Random(tally.seed)
    with scenes.workspace() as workspace:
        root = workspace / "store"
        with open_store(opener, root):
            pass
        sessions = [Session(-1) for _ in _PREFIXES]
        for index in range(trials):
            before = sum(len(session.acked) for session in sessions)
            _run_and_kill(root, opener, sessions, generator, tally.seed)
            acknowledged = sum(len(session.acked) for session in sessions) - before
            finding = _look(opener, root, sessions, tally.seed, acknowledged)
            tally.add(finding, where=f"kill {index + 1}")
            for session in sessions:
                session.errors.clear()
            tell(index + 1, trials, "two writers killed")
        if not any(session.acked for session in sessions):
            raise NotMeasured("no commit returned before its writer was killed")


def _run_and_kill(
    root: Path, opener: str, sessions: list[Session], generator: random.Random, seed: int
) -> None:
    with contextlib.ExitStack() as stack:
        running = []
        for prefix, session in zip(_PREFIXES, sessions, strict=True):
            # Round 0 has a state no later one has, so it must be there before they begin.
            first = max(session.begun) + 1 if session.acked else 0
            command = children.writer(
                root, opener, seed=seed, first=first, rounds=_ROUNDS, shape=_SHAPE, prefix=prefix
            )
            running.append(stack.enter_context(children.killed_at_end(command)))
        outputs = [_first_lines(child) for child in running]
        for child in generator.sample(running, len(running)):
            time.sleep(generator.uniform(*_BEFORE_KILL_S))
            children.kill(child)
        for child, output, session in zip(running, outputs, sessions, strict=True):
            rest, _ = child.communicate()
            said = session_of(output + rest)
            session.begun += said.begun
            session.acked |= said.acked
            session.errors += said.errors


def _first_lines(child: subprocess.Popen[bytes]) -> bytes:
    """Waits until a writer has said something, so that a kill strikes its commits."""
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    deadline = time.monotonic() + _START_S
    output = b""
    while time.monotonic() < deadline and child.poll() is None:
        try:
            output += os.read(child.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            time.sleep(0.002)
        if output:
            break
    os.set_blocking(child.stdout.fileno(), True)
    return output


def _look(
    opener: str, root: Path, sessions: list[Session], seed: int, acknowledged: int
) -> Finding:
    started = time.perf_counter()
    try:
        with open_store(opener, root) as store:
            recovery = time.perf_counter() - started
            shown = [workload.seen(store, prefix=prefix) for prefix in _PREFIXES]
            notes = {generation.number: generation.note for generation in store.generations()}
            verified = store.verify(deep=True)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return Finding(result=Result.UNRECOVERABLE, message=message, acknowledged=acknowledged)
    result, message = _verdict(shown, notes, sessions, seed)
    if result in (Result.OLD, Result.NEW) and verified.problems:
        result = Result.TORN
        message = f"{verified.problems[0].where}: {verified.problems[0].what}"
    if result in (Result.OLD, Result.NEW) and _overwrites(opener, root):
        result, message = Result.LOST, "a commit overwrote a newer one that it was not based on"
    return Finding(
        result=result,
        message=message,
        acknowledged=acknowledged,
        recovery_s=recovery,
        orphans=verified.orphans,
    )


def _overwrites(opener: str, root: Path) -> bool:
    """Whether one of two writers can commit over what the other has committed since it looked."""
    from forge_harness.state import NewState

    def state(content: bytes) -> NewState:
        files = {"data": content}
        return NewState(phase=workload.PHASE, kind=workload.KIND, name="shared", files=files)

    with open_store(opener, root) as one, open_store(opener, root) as other:
        parent = one.commit([state(b"seen by both")]).number
        other.commit([state(b"theirs")], parent=parent)
        try:
            one.commit([state(b"mine")], parent=parent)
        except ConflictError:
            return False
    return True


def _verdict(
    shown: list[workload.View], notes: dict[int, str], sessions: list[Session], seed: int
) -> tuple[Result, str]:
    if errors := [error for session in sessions for error in session.errors]:
        return Result.LOST, f"a commit failed for another writer: {errors[0]}"
    result = Result.OLD
    for prefix, session, view in zip(_PREFIXES, sessions, shown, strict=True):
        found = [
            round_
            for round_ in session.allowed()
            if view == workload.view(seed, round_, _SHAPE, prefix=prefix)
        ]
        if not found:
            return Result.LOST, f"{prefix}round {session.last_acked} was acknowledged and is gone"
        result = Result.NEW if found[0] != session.last_acked else result
        for round_, generation in session.acked.items():
            if notes.get(generation) != f"{prefix}round {round_}":
                return Result.LOST, f"generation {generation} is not {prefix}round {round_}"
    return result, ""
