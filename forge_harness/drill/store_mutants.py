"""Stores with one seeded bug each: what the campaigns are themselves measured with.

Every function here opens a store as `Store.open` does, with one behaviour changed. Each bug is one
that a real saver or database had or is known for.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Self

from forge_harness.state import CollectReport, Fs, Generation, NewState, Store, VerifyReport
from forge_harness.state.blobs import Blobs, Staged
from forge_harness.state.contents import Contents
from forge_harness.state.hashing import StreamDigest
from forge_harness.state.index import Index
from forge_harness.state.migrations import STEPS
from forge_harness.state.opening import INDEX
from forge_harness.state.records import BlobRef
from forge_harness.state.schema import VERSION, version_of

Keep = Collection[int] | Callable[[], Collection[int]]


class _NoFileSync(Blobs):
    """torch.save and safetensors do not sync either."""

    def sync(self, handle: int) -> None:
        pass


class _NoNameSync(Blobs):
    """Most "atomic write" helpers stop after the rename."""

    def sync_names(self, directory: Path) -> None:
        pass


class _RetriedSync(Blobs):
    """PostgreSQL before 2018: the second fsync succeeds and wrote nothing ("fsyncgate")."""

    def sync(self, handle: int) -> None:
        try:
            self.fs.fsync(handle)
        except OSError:
            self.fs.fsync(handle)


class _IgnoredSync(Blobs):
    """An error of fsync that is logged at best."""

    def sync(self, handle: int) -> None:
        with contextlib.suppress(OSError):
            self.fs.fsync(handle)


class _InPlace(Blobs):
    """Writes over the content that is there, as torch DCP does with its shards."""

    def publish(self, staged: Sequence[Staged]) -> None:
        for item in staged:
            target = self.path(item.name)
            self._make_directory(target.parent)
            content = item.temp.read_bytes()
            handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                os.write(handle, content[: len(content) // 2])
                os.write(handle, content[len(content) // 2 :])
                os.fsync(handle)
            finally:
                os.close(handle)
            self.sync_names(target.parent)
            self.discard(item.temp)


class _ShortWrites(Blobs):
    """Takes it that a write takes everything, as a bare `os.write` looks like."""

    def _fill(self, handle: int, temp: Path, source: bytes | Path) -> Staged:
        data = source if isinstance(source, bytes) else source.read_bytes()
        self.fs.write(handle, memoryview(data))
        digest = StreamDigest()
        digest.update(data)
        plain = digest.hexdigest
        return Staged(temp, plain, digest.size, digest.prefixes, plain, digest.size, 0)


class _NoAdoptSync(Blobs):
    """Takes a file that is there for one that is on disk."""

    def adopt(self, path: Path) -> None:
        pass


class _TrustsOrphans(Blobs):
    """Takes a file that has the name of a content for the content, as git long did."""

    def publish(self, staged: Sequence[Staged]) -> None:
        there = [item for item in staged if self.fs.exists(self.path(item.name))]
        for item in there:
            self._make_directory(self.path(item.name).parent)
            self.adopt(self.path(item.name))
            self.discard(item.temp)
            self.sync_names(self.path(item.name).parent)
        super().publish([item for item in staged if item not in there])


class _DeletesDamaged(Blobs):
    """Removes what does not verify, as a cache does, and with it what could be mended."""

    def quarantine(self, name: str) -> Path | None:
        with contextlib.suppress(OSError):
            self.fs.unlink(self.path(name))
        return None


class _NoCheck(Contents):
    """Trusts the disk: what it reads is what it returns."""

    def agrees(self, ref: BlobRef, found: StreamDigest) -> bool:
        return True

    def _is_good(self, ref: BlobRef) -> bool:
        return self.index.object(ref.digest) is not None


class _AlwaysRewrites(Contents):
    """Publishes again what is there already."""

    def _is_good(self, ref: BlobRef) -> bool:
        return False


class _IndexFirst(Store):
    """Refers to contents before they are there."""

    def publish(self, files: Sequence[Staged], record: Callable[[], None]) -> None:
        record()
        self._blobs.publish(files)


class _NoLock(Store):
    """Relies on everybody else to keep away."""

    def writing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def reading(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _NoReadLock(Store):
    """Readers take no lock, as where files are only ever added."""

    def reading(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _IgnoresParent(Store):
    """The last writer wins."""

    def _expect(self, parent: int | None) -> str | None:
        return super()._expect(None)


class _NoHead(Store):
    """Leaves it to SQLite's log to know what was committed last."""

    def _note(self, number: int, digest: str) -> None:
        pass


class _NoGrace(Store):
    """Takes whatever no generation refers to for garbage, however young."""

    def collect(
        self, *, retain: int | None = None, keep: Keep = (), grace_s: float = 3600.0
    ) -> CollectReport:
        return super().collect(retain=retain, keep=keep, grace_s=0.0)


class _ForgetsKept(Store):
    """Marks from the newest generation only."""

    def collect(
        self, *, retain: int | None = None, keep: Keep = (), grace_s: float = 3600.0
    ) -> CollectReport:
        return super().collect(retain=1, grace_s=grace_s)


class _CollectsDamaged(Store):
    """Takes the generations it can read for all there are."""

    def _check_complete(self) -> None:
        pass


class _EarlyAnswer(Store):
    """Says yes and commits later, as a cache in front of a database does."""

    _waiting: Sequence[NewState] = ()

    def commit(
        self, states: Sequence[NewState], *, note: str = "", parent: int | None = None
    ) -> Generation:
        self._flush()
        self._waiting = states
        number = self._history.last_number + 1
        return Generation(
            number=number,
            manifest_digest="",
            parent_digest=None,
            note=note,
            created_at="",
            changed=(),
        )

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, ()
        if waiting:
            super().commit(waiting)

    def close(self) -> None:
        self._flush()
        super().close()


class _UnsyncedIndex(Store):
    """SQLite with synchronous=NORMAL, the setting most guides recommend with WAL."""

    def _start(self, version: int) -> None:
        super()._start(version)
        if not self.read_only:
            self._opened().connection.execute("PRAGMA synchronous = NORMAL")


class _TwoCommits(Store):
    """Commits the states of one call one by one."""

    def commit(
        self, states: Sequence[NewState], *, note: str = "", parent: int | None = None
    ) -> Generation:
        for state in states:
            generation = super().commit([state], note=note, parent=parent)
        return generation


class _BlindVerify(Store):
    """Finds nothing and reads nothing back twice."""

    def make_contents(self, index: Index) -> Contents:
        return _NoCheck(index, self._blobs)

    def verify(self, *, deep: bool = True, quarantine: bool = False) -> VerifyReport:
        return super().verify(deep=False)


class _PiecemealMigration(Store):
    """Migrates statement by statement, each committed by itself."""

    def _create_or_migrate(self, fs: Fs) -> None:
        self._blobs.create()
        self._index = self.make_index(read_only=False)
        connection = self._index.connection
        if version_of(connection) == 0:
            self._index.create_layout()
        while (version := version_of(connection)) < VERSION:
            STEPS[version](connection)
            connection.execute(f"PRAGMA user_version = {version + 1}")


class _NoBackup(Store):
    """Migrates in place: what a step got wrong cannot be put right any more."""

    def _create_or_migrate(self, fs: Fs) -> None:
        self._blobs.create()
        self._index = self.make_index(read_only=False)
        connection = self._index.connection
        if version_of(connection) == 0:
            self._index.create_layout()
        while (version := version_of(connection)) < VERSION:
            with self._index.transaction():
                STEPS[version](connection)
                connection.execute(f"PRAGMA user_version = {version + 1}")


class _AnySchema(Store):
    """Takes a schema it does not know for its own."""

    @classmethod
    def open(cls, root: Path, **options: Any) -> Self:  # noqa: ANN401
        index = root / INDEX
        if index.exists():
            with contextlib.closing(sqlite3.connect(index)) as connection:
                if version_of(connection) > VERSION:
                    connection.execute(f"PRAGMA user_version = {VERSION}")
        return super().open(root, **options)


def _with_blobs(kind: type[Blobs], *, contents: type[Contents] = Contents) -> type[Store]:
    class Changed(Store):
        def make_blobs(self, fs: Fs, sealer: Any) -> Blobs:  # noqa: ANN401
            return kind(self.root, fs, sealer)

        def make_contents(self, index: Index) -> Contents:
            return contents(index, self._blobs)

    return Changed


no_file_sync = _with_blobs(_NoFileSync).open
no_name_sync = _with_blobs(_NoNameSync).open
retried_sync = _with_blobs(_RetriedSync).open
ignored_sync = _with_blobs(_IgnoredSync).open
in_place = _with_blobs(_InPlace, contents=_AlwaysRewrites).open
short_writes = _with_blobs(_ShortWrites).open
no_adopt_sync = _with_blobs(_NoAdoptSync).open
trusts_orphans = _with_blobs(_TrustsOrphans).open
deletes_damaged = _with_blobs(_DeletesDamaged).open
no_check = _BlindVerify.open
index_first = _IndexFirst.open
no_lock = _NoLock.open
no_read_lock = _NoReadLock.open
ignores_parent = _IgnoresParent.open
no_head = _NoHead.open
no_grace = _NoGrace.open
forgets_kept = _ForgetsKept.open
collects_damaged = _CollectsDamaged.open
early_answer = _EarlyAnswer.open
unsynced_index = _UnsyncedIndex.open
two_commits = _TwoCommits.open
piecemeal_migration = _PiecemealMigration.open
no_backup = _NoBackup.open
any_schema = _AnySchema.open
