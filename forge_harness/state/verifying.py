"""Looking at everything a store holds, and saying what is wrong with it.

The readers' lock is not held from end to end: contents take minutes to read where there are many,
and no commit waits as long. What is collected meanwhile is gone on purpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from forge_harness.errors import DamagedStateError, ForgeError

from .contents import Contents
from .head import read_head, read_losses
from .history import History
from .index import StoredObject
from .lock import Turns
from .records import BlobRef, Problem, VerifyReport


def verify(
    contents: Contents, root: Path, turns: Turns, *, deep: bool, quarantine: bool
) -> VerifyReport:
    """Returns what is there and what is wrong; see `Store.verify`. The lock is held."""
    index, blobs = contents.index, contents.blobs
    problems = [Problem(index.path.name, text) for text in index.integrity(deep=deep)]
    history = History()
    head, losses = read_head(root), read_losses(root)
    history.extend(index.rows_after(0))
    history.report(head, losses)
    problems += history.problems
    try:
        known = {stored.digest: stored for stored in index.objects()}
    except DamagedStateError as error:
        problems.append(Problem(index.path.name, str(error)))
        known = {}
    wanted = _wanted(history)
    present = {stored.stored for stored in known.values() if stored.collected_at is None}
    present |= {ref.digest for ref in wanted}
    orphans = sum(name not in present for name in blobs.names())
    orphans += len(blobs.fs.names(blobs.temporary))
    foreign = tuple(str(path.relative_to(root)) for path in blobs.foreign())
    current = set(history.view().values())
    found: Counter[str] = Counter()
    if not index.is_frozen:
        contents.let_go = turns.let_go
    for ref, (where, ids) in wanted.items():
        if not index.is_frozen:
            turns.give_way()
        stored = known.get(ref.digest)
        if _is_collected(stored) and not ids & current:
            found["collected"] += 1
            continue
        try:
            found[_check(contents, ref, deep=deep, quarantine=quarantine)] += 1
        except (ForgeError, OSError) as error:
            if not _is_collected(stored) and _is_collected(_row(contents, ref)):
                found["collected"] += 1
                continue
            said = f"content {ref.digest} cannot be read: {error}"
            problems.append(Problem(where, said if isinstance(error, OSError) else str(error)))
    return VerifyReport(
        deep=deep,
        generations=len(history.generations()),
        states=len(history.states),
        contents=len(wanted) - found["collected"],
        content_bytes=_stored_bytes(known, wanted),
        collected=found["collected"],
        unread=found["unread"],
        unopened=found["unopened"],
        orphans=orphans,
        quarantined=len(blobs.fs.names(blobs.quarantined)),
        foreign=foreign,
        problems=tuple(problems),
    )


def _wanted(history: History) -> Mapping[BlobRef, tuple[str, set[str]]]:
    """Content -> where it was first used, and the ids of all states that have it."""
    wanted: dict[BlobRef, tuple[str, set[str]]] = {}
    for state in history.states.values():
        for name, ref in state.files.items():
            where = f"generation {state.generation}, {state.phase}/{state.name}, file {name!r}"
            wanted.setdefault(ref, (where, set()))[1].add(state.id)
    return wanted


def _row(contents: Contents, ref: BlobRef) -> StoredObject | None:
    try:
        return contents.index.object(ref.digest)
    except ForgeError:
        return None


def _is_collected(stored: StoredObject | None) -> bool:
    return stored is not None and stored.collected_at is not None


def _check(
    contents: Contents, ref: BlobRef, *, deep: bool, quarantine: bool
) -> Literal["verified", "unopened", "unread"]:
    """Raises ForgeError or OSError unless a content is good, as far as that can be seen."""
    stored = contents.locate(ref)
    if deep and not (stored.sealed and contents.blobs.sealer is None):
        contents.verify(ref, quarantine=quarantine)
        return "verified"
    if deep:
        found = contents.index.object(ref.digest)
        good = found is not None and contents.stored_is_good(found)
    else:
        good = stored.size == ref.size and (
            stored.content is not None
            or contents.blobs.stored_size(stored.stored) == stored.stored_size
        )
    if not good:
        raise DamagedStateError(
            f"content {ref.digest} is missing or not what was written", digest=ref.digest
        )
    return "unopened" if deep else "unread"


def _stored_bytes(
    known: Mapping[str, StoredObject], wanted: Mapping[BlobRef, tuple[str, set[str]]]
) -> int:
    return sum(
        known[ref.digest].stored_size
        for ref in wanted
        if ref.digest in known and known[ref.digest].collected_at is None
    )
