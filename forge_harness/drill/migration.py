"""Campaigns `migration` and `newer_schema`: stores of other releases.

Old stores are fixtures: directories as the earlier releases wrote them, each with a JSON file of
the same name beside it that says what it must show, written down when it was made.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from forge_harness.canonical import file_sha256
from forge_harness.drill import children, scenes, strace, workload
from forge_harness.drill.strace import Call, Fault
from forge_harness.drill.syscalls import sample
from forge_harness.drill.tally import Finding, NotMeasured, Result, Tally, hung
from forge_harness.drill.target import open_store
from forge_harness.drill.workload import View
from forge_harness.errors import NewerSchemaError

_SQLITE = b"SQLite format 3\0"
_NEWER = 1000
"""Schemas beyond the one there is."""

Step = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class OldStore:
    """A store an earlier release wrote."""

    name: str
    root: Path
    view: View


def old_stores(directory: Path | None) -> list[OldStore]:
    """Reads the fixtures.

    Raises:
        NotMeasured: There are none.
    """
    found = sorted(directory.glob("*.json")) if directory is not None else []
    stores = [
        OldStore(path.stem, path.with_suffix(""), json.loads(path.read_text(encoding="utf-8")))
        for path in found
        if path.with_suffix("").is_dir()
    ]
    if not stores:
        raise NotMeasured(f"there is no old store in {directory}")
    return stores


def migrate_all(
    tally: Tally,
    opener: str,
    directory: Path | None,
    *,
    faults: Sequence[Fault],
    limit: int,
    tell: Step,
) -> None:
    """Opens each old store, untouched and struck at each system call, and reads it all.

    Args:
        tally: Takes the findings.
        opener: What opens a store and migrates it.
        directory: Where the old stores are.
        faults: What is done to a call of the migration.
        limit: Most trials; all of them when 0. The ones that are not struck come first.
        tell: Progress.

    Raises:
        NotMeasured: There is no old store, or strace does not run here.
    """
    stores = old_stores(directory)
    strace.require()
    with scenes.workspace() as workspace:
        root, trace = workspace / "store", workspace / "trace"
        opened = children.program("storage_opener", root, opener)
        command = children.cached_in(opened, workspace / "byte code")
        trials = []
        untouched = sample(stores, limit, tally.seed)
        for old in stores:
            points = _points(command, old, root, trace)
            if old in untouched:
                tally.add(_look(opener, root, old), where=f"{old.name}, not struck")
            tally.points += len(points) * len(faults)
            trials += [(old, point, fault) for point in points for fault in faults]
        rest = limit - len(untouched)
        # `sample` takes 0 for all there are.
        chosen = sample(trials, max(rest, 0), tally.seed) if rest else []
        tally.points_tried = len(chosen)
        for index, (old, point, fault) in enumerate(chosen):
            where = f"{old.name}, {fault.name} at {point.name} #{point.nth}"
            strike = partial(_strike, command, old, root, trace, fault)
            again = partial(_points, command, old, root, trace)
            try:
                missed = strace.aimed(point, strike, again) is None
            except TimeoutError as error:
                tally.add(hung(error), where=where)
            else:
                if missed:
                    tally.miss(where)
                else:
                    tally.add(_look(opener, root, old), where=where)
            tell(index + 1, len(chosen), where)


def _points(command: Sequence[str], old: OldStore, root: Path, trace: Path) -> list[Call]:
    scenes.fresh(old.root, root)
    children.fill_cache(command)
    scenes.fresh(old.root, root)
    return strace.points_of(strace.record(command, trace), root)


def _strike(
    command: Sequence[str], old: OldStore, root: Path, trace: Path, fault: Fault, point: Call
) -> bytes | None:
    scenes.fresh(old.root, root)
    return strace.strike(command, point, fault, trace, root)


def refuse_newer(tally: Tally, opener: str, *, limit: int, tell: Step) -> None:
    """Raises the schema number of a store, opens it in each way, and compares every byte.

    Args:
        tally: Takes the findings.
        opener: What opens the store.
        limit: Most ways; all of them when 0.
        tell: Progress.
    """
    known: Sequence[dict[str, bool]] = (
        {},
        {"create": False},
        {"create": False, "read_only": True},
    )
    ways = sample(known, limit, tally.seed)
    with scenes.workspace() as workspace:
        template = workspace / "template"
        scenes.prepare(scenes.COMMIT, template, opener, tally.seed)
        index_file = _database(template)
        for number, options in enumerate(ways):
            root = scenes.fresh(template, workspace / "store")
            with contextlib.closing(sqlite3.connect(root / index_file)) as connection:
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                connection.execute(f"PRAGMA user_version = {version + _NEWER}")
            # As a copy of a closed store has it: the schema in the file itself, no log.
            with contextlib.closing(sqlite3.connect(root / index_file)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finding = _refused(opener, root, options)
            tally.add(finding, where=f"schema {version + _NEWER}, opened with {options}")
            tell(number + 1, len(ways), "newer schema")


def _refused(opener: str, root: Path, options: dict[str, bool]) -> Finding:
    before = tree_digests(root)
    message = ""
    try:
        open_store(opener, root, **options).close()
    except NewerSchemaError:
        pass
    except Exception as error:
        message = f"refused as {type(error).__name__}, not as a newer schema: {error}"
    else:
        message = "opened as if it were known"
    after = tree_digests(root)
    changed = sorted(
        path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
    )
    if changed:
        return Finding(result=Result.TORN, message=f"{changed[0]} was changed")
    if message:
        return Finding(result=Result.SILENT, message=message)
    return Finding(result=Result.REFUSED)


def tree_digests(root: Path) -> dict[str, str]:
    """Returns path -> SHA-256 of every file below a directory; "" for a directory."""
    return {
        str(path.relative_to(root)): file_sha256(path) if path.is_file() else ""
        for path in root.rglob("*")
    }


def _database(root: Path) -> Path:
    for path in sorted(root.iterdir()):
        if path.is_file() and path.read_bytes()[:16] == _SQLITE:
            return path.relative_to(root)
    raise NotMeasured(f"the store has no SQLite index in {sorted(p.name for p in root.iterdir())}")


def _kept_old_index(root: Path, old: Path) -> bool:
    """Whether a store that was migrated has the index it had before, whole, in whatever file.

    Without it nobody can go back to the release that wrote the store, or mend what a step got
    wrong.
    """
    index = _database(old)
    before, after = _dump(old / index), _dump(root / index)
    if before[:1] == after[:1]:  # The schema: there was nothing to migrate.
        return True
    others = (path for path in root.rglob("*") if path.is_file() and path != root / index)
    return any(path.read_bytes()[:16] == _SQLITE and _dump(path) == before for path in others)


def _dump(path: Path) -> list[str]:
    """Schema and rows of a database, [] where there are none to be had."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            return [str(version), *connection.iterdump()]
        except sqlite3.DatabaseError:
            return []


def _look(opener: str, root: Path, old: OldStore) -> Finding:
    started = time.perf_counter()
    try:
        with open_store(opener, root, create=False) as store:
            recovery = time.perf_counter() - started
            shown = workload.seen(store)
            verified = store.verify(deep=True)
            store.commit(workload.states(0, 0, "small"), note="after the migration")
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return Finding(result=Result.UNRECOVERABLE, message=message, acknowledged=len(old.view))
    result, message = Result.OLD, ""
    if not _kept_old_index(root, old.root):
        result, message = Result.LOST, "there is no copy of the index as it was"
    elif shown != old.view:
        missing = sorted(old.view.keys() - shown.keys())
        result = Result.LOST if missing else Result.TORN
        message = f"{(missing or ['a state'])[0]} is gone" if missing else "a state is another"
    elif verified.problems:
        result = Result.TORN
        message = f"{verified.problems[0].where}: {verified.problems[0].what}"
    return Finding(
        result=result,
        message=message,
        acknowledged=len(old.view),
        recovery_s=recovery,
        orphans=verified.orphans,
    )
