"""Removing contents no retained generation has: mark from the generations, sweep what is old."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path

from forge_harness.errors import DamagedStateError, StateError, UnknownStateError

from .contents import Contents
from .history import History
from .index import StoredObject
from .records import CollectReport


def collect(
    contents: Contents,
    history: History,
    *,
    retain: int | None,
    keep: Collection[int],
    grace_s: float,
) -> CollectReport:
    """Removes what nothing needs; see `Store.collect`. The exclusive lock is held."""
    if not grace_s >= 0:
        raise StateError(f"The grace of a collection is {grace_s} s; expected 0 or more.")
    retained = _retained(history, retain, keep)
    needed = _needed(history, retained)
    lost = _lost(contents, needed)
    # Without grace no clock counts, which may have been ahead when something was written.
    before = time.time() - grace_s if grace_s else math.inf
    sweep = Sweep(contents, before, spare_orphans=lost)
    # The index first: content that is gone must never be referred to as if it were there.
    removed = sweep.forget(needed)
    sweep.files()
    return CollectReport(
        retained=len(retained),
        contents_removed=len(removed),
        files_removed=sweep.files_removed,
        bytes_freed=sweep.bytes_freed,
        kept_by_grace=sweep.kept,
        quarantined=len(contents.blobs.fs.names(contents.blobs.quarantined)),
    )


def _retained(history: History, retain: int | None, keep: Collection[int]) -> list[int]:
    numbers = [generation.number for generation in history.generations()]
    # True is 1 to Python, and would free all but the newest.
    if retain is not None and (type(retain) is not int or retain < 1):
        raise StateError(
            f"A collection cannot retain {retain!r} generations; expected a number from 1, or None "
            "for all."
        )
    unknown = sorted(set(keep) - set(numbers))
    if unknown:
        raise UnknownStateError(
            f"Generation {unknown[0]} is to be kept and is not in the store. List the generations "
            "first."
        )
    newest = numbers if retain is None else numbers[-retain:]
    return sorted({*newest, *keep})


def _needed(history: History, retained: list[int]) -> set[str]:
    """Digests of every content a retained generation has."""
    generations = history.generations()
    newest = [g for g in generations if g.number in set(retained)]
    ids: set[str] = set(history.view().values())
    # The last unbroken run needs one view: the others differ from it by what they put.
    run = 0
    while run < len(newest) and newest[-1 - run] is generations[-1 - run]:
        run += 1
    for generation in newest[len(newest) - run :]:
        ids.update(generation.changed)
    for generation in newest[: len(newest) - run + 1]:
        ids.update(history.view(generation.number).values())
    return {ref.digest for at in ids for ref in history.states[at].files.values()}


def _lost(contents: Contents, needed: Collection[str]) -> bool:
    """Returns whether a file of no content may be one that is needed.

    Sealed files have names that only the index knows; others are found by their digests.

    Raises:
        DamagedStateError: The index has lost where a content is.
    """
    known = {stored.digest: stored for stored in contents.index.objects()}
    blobs, lost = contents.blobs, False
    for digest in sorted(needed):
        stored = known.get(digest)
        if stored is None and contents.index.has_sealed() and blobs.stored_size(digest) is None:
            raise DamagedStateError(
                f"The index {contents.index.path} has lost where content {digest} is, so what may "
                "go is not known; nothing was collected. Restore the index from a copy, or retain "
                "no generation that has the content.",
                path=str(contents.index.path),
                digest=digest,
            )
        if stored is not None and stored.sealed and stored.content is None:
            lost = lost or blobs.stored_size(stored.stored) is None
    return lost


class Sweep:
    """Removes contents, orphans and temporary files that are old enough.

    Args:
        contents: Of the store.
        before: Seconds since the epoch; what is younger stays.
        spare_orphans: Whether files of no content stay.
    """

    def __init__(self, contents: Contents, before: float, *, spare_orphans: bool = False) -> None:
        self.contents = contents
        self.before = before
        self.spare_orphans = spare_orphans
        self.files_removed = 0
        self.bytes_freed = 0
        self.kept = 0
        self._live: set[str] = set()
        self._doomed: set[str] = set()

    def forget(self, needed: Collection[str]) -> list[StoredObject]:
        """Marks contents as collected in the index and returns them; files go later."""
        removed = []
        for stored in self.contents.index.objects():
            if stored.collected_at is not None:
                continue
            if stored.digest in needed:
                self._live.add(stored.stored)
            elif not self.is_old(stored.created_at or self._written_at(stored)):
                self._live.add(stored.stored)
                self.kept += 1
            else:
                removed.append(stored)
                self._doomed.add(stored.stored)
        # A damaged row must not make its file an orphan.
        self._live.update(needed)
        if removed:
            when = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
            with self.contents.index.transaction():
                self.contents.index.mark_collected((stored.digest for stored in removed), when)
        self.bytes_freed += sum(s.stored_size for s in removed if s.content is not None)
        return removed

    def files(self) -> None:
        """Removes files of no content, and temporary files, that are old enough."""
        blobs = self.contents.blobs
        for name in list(blobs.names()):
            doomed = name in self._doomed
            if name not in self._live and (doomed or not self.spare_orphans):
                self._remove(blobs.path(name), at_once=doomed)
        for name in blobs.fs.names(blobs.temporary):
            self._remove(blobs.temporary / name, at_once=False)

    def is_old(self, moment: float) -> bool:
        """Returns whether something written at a moment is beyond the grace period."""
        return moment <= self.before

    def _remove(self, path: Path, *, at_once: bool) -> None:
        fs = self.contents.blobs.fs
        try:
            if not at_once and not self.is_old(fs.modified_at(path)):
                self.kept += 1
                return
            size = fs.size(path)
            fs.unlink(path)
        except FileNotFoundError:  # Its writer gave it up or took it.
            return
        except IsADirectoryError:  # No store made it.
            return
        self.files_removed += 1
        self.bytes_freed += size

    def _written_at(self, stored: StoredObject) -> float:
        blobs = self.contents.blobs
        try:
            return blobs.fs.modified_at(blobs.path(stored.stored))
        except FileNotFoundError:
            return 0.0
