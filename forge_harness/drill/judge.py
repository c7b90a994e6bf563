"""After a fault: opens the store, reads everything, and says what happened to what was promised."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

from forge_harness.drill import workload
from forge_harness.drill.children import Session
from forge_harness.drill.tally import Finding, Result
from forge_harness.drill.target import open_store
from forge_harness.drill.workload import View
from forge_harness.errors import several

_AFTERWARDS = 1_000_000
"""A round no campaign reaches: the commit that shows a recovered store still takes commits."""


def judge(opener: str, root: Path, session: Session, *, seed: int, shape: str) -> Finding:
    """Opens a store a fault has struck and compares it with what its writer was told.

    A sound store shows the last acknowledged round or one begun after it, whole; verifies; and
    takes another commit, which is there when it is opened once more.

    Args:
        opener: What opens it.
        root: Its directory.
        session: What the writer acknowledged.
        seed: Seed of the workload.
        shape: Workload.
    """
    allowed = {round_: workload.view(seed, round_, shape) for round_ in session.allowed()}
    acknowledged = len(session.acked)
    started = time.perf_counter()
    try:
        with open_store(opener, root) as store:
            recovery = time.perf_counter() - started
            shown = workload.seen(store)
            verified = store.verify(deep=True)
    except Exception as error:
        return Finding(result=Result.UNRECOVERABLE, message=_what(error), acknowledged=acknowledged)
    result, message = _compare(shown, allowed, session, seed, shape)
    if result in (Result.OLD, Result.NEW) and verified.problems:
        first = verified.problems[0]
        result, message = Result.TORN, f"{first.where}: {first.what}"
    if result in (Result.OLD, Result.NEW):
        with contextlib.suppress(_Unusable):
            _commits(opener, root, seed, shape)
            return Finding(
                result=result,
                acknowledged=acknowledged,
                recovery_s=recovery,
                orphans=verified.orphans,
            )
        result, message = Result.UNRECOVERABLE, "it takes no commit any more"
    return Finding(result=result, message=message, acknowledged=acknowledged, recovery_s=recovery)


def _compare(
    shown: View, allowed: Mapping[int, View], session: Session, seed: int, shape: str
) -> tuple[Result, str]:
    for round_, wanted in allowed.items():
        if shown == wanted:
            return (Result.OLD if round_ == session.last_acked else Result.NEW), ""
    if shown != {} and set(shown) != set(allowed[session.last_acked]):
        return Result.TORN, f"it shows {several(len(shown), 'file')}, of no round"
    for round_ in range(session.last_acked - 1, -2, -1):
        if shown == workload.view(seed, round_, shape):
            return Result.LOST, f"round {session.last_acked} was acknowledged, it shows {round_}"
    return Result.TORN, "its files are of several rounds"


class _Unusable(Exception):
    """The store does not keep what it is given any more."""


def _commits(opener: str, root: Path, seed: int, shape: str) -> None:
    try:
        with open_store(opener, root) as store:
            store.commit(workload.states(seed, _AFTERWARDS, shape), note="afterwards")
        with open_store(opener, root) as store:
            shown = workload.seen(store)
    except Exception as error:
        raise _Unusable(_what(error)) from error
    wanted = workload.view(seed, _AFTERWARDS, shape)
    if {key: shown.get(key) for key in wanted if "/kept/" not in key} != {
        key: digest for key, digest in wanted.items() if "/kept/" not in key
    }:
        raise _Unusable("it lost the commit made after the recovery")


def _what(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
