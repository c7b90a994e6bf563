"""The index: one SQLite file that says what is in the store, in one transaction a commit."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from forge_harness.durable import identity_of
from forge_harness.errors import DamagedStateError, ForgeError, StateError, StoreLockedError
from forge_harness.forks import never_free

from .history import Row
from .schema import create, version_of

_COLUMNS = "digest, size, sealed, stored, stored_size, created_at, collected_at, prefixes, content"
_BUSY = {"SQLITE_BUSY", "SQLITE_LOCKED"}
_UNWRITABLE = {"SQLITE_CANTOPEN", "SQLITE_READONLY"}
_NO_ROOM = {*_UNWRITABLE, "SQLITE_FULL", "SQLITE_IOERR"}
"""What SQLite says where it cannot make a file beside the index."""
_DAMAGED = {"SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_FORMAT", "SQLITE_SCHEMA", "SQLITE_MISMATCH"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """Where a content is."""

    digest: str
    """SHA-256 of the plaintext."""
    size: int
    sealed: int
    """0: not sealed; n: sealed, and a change of key rewrites the first n - 1 bytes."""
    stored: str
    """SHA-256 of the bytes as they lie on disk, without the ones a change of key rewrites; the name
    of the file, when a file holds them."""
    stored_size: int
    created_at: float
    """Seconds since the epoch."""
    collected_at: str | None
    """When a collection removed it, else None."""
    prefixes: bytes
    """SHA-256 of the plaintext up to the end of each chunk, one after the other; empty for one."""
    content: bytes | None
    """The bytes themselves when the index holds them, else None."""


class Index:
    """An open index; any thread may use it, one at a time.

    Attributes:
        is_frozen: Whether it must be read under one lock: it does not follow commits of others.
    """

    def __init__(self, path: Path, *, read_only: bool = False, timeout_s: float = 10.0) -> None:
        self.path = path
        self._mutex = threading.RLock()
        self._gone = ""
        """Why the connection must not be used any more, "" while it may."""
        self._sealed, self._sealed_at = False, -1
        self._newest: StoredObject | None = None
        self._newest_at = -1
        with self.translated():
            self.connection, self.is_frozen = _connect(
                path, read_only=read_only, timeout_s=timeout_s
            )
        self._place = path.absolute()
        self._identity = identity_of(self._place)

    def close(self) -> None:
        """Closes the file; the last one to do so folds the write-ahead log into it."""
        # Not under the feet of another thread: what SQLite is executing would lose its memory.
        with self._mutex:
            if not self._gone:
                self._gone = "was closed"
                self.connection.close()

    def disown(self) -> None:
        """Gives the file up without closing it; for a child of fork, whose parent has it open.

        SQLite's locks stay with the parent. A child that went on would write to a log that is no
        longer there once the parent has closed the file, and one that closed it could remove the
        log of others.
        """
        self._mutex = threading.RLock()  # Another thread may have held it when the process forked.
        if not self._gone:
            self._gone = "was opened before this process was forked"
            never_free(self.connection)

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Keeps other threads out and turns SQLite's errors into the store's.

        Raises:
            StoreLockedError: Another process has the index for longer than the timeout.
            DamagedStateError: The file is not a database any more.
            StateError: The disk is full or refuses, or the file was closed meanwhile.
        """
        with self._mutex:
            if self._gone:
                raise StateError(
                    f"The index {self.path} {self._gone}. Open the store again in this process."
                )
            try:
                yield
            except sqlite3.Error as error:
                raise _translation(self.path, error) from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Runs a block in one transaction that is on disk when this returns, or was not made."""
        with self.translated():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                self._check_place()
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                self._newest_at = -1
                with contextlib.suppress(sqlite3.Error):
                    if self.connection.in_transaction:
                        self.connection.execute("ROLLBACK")
                raise

    def _check_place(self) -> None:
        # SQLite would go on in a file that nobody finds any more.
        if identity_of(self._place) != self._identity:
            raise StateError(
                f"The index {self.path} was moved, removed or replaced since the store was opened, "
                "so nothing was committed. Open the store again."
            )

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Keeps commits of others from showing up between two queries."""
        with self.translated():
            inside = self.connection.in_transaction
            if not inside:
                self.connection.execute("BEGIN")
            try:
                yield
            finally:
                if not inside and self.connection.in_transaction:
                    self.connection.execute("COMMIT")

    def create_layout(self) -> None:
        """Makes the tables when a kill, or nobody, left the file without them."""
        with self.transaction():
            if version_of(self.connection) == 0:
                create(self.connection)

    def rows_after(self, number: int) -> list[Row]:
        """Returns the generations beyond `number`, oldest first, whatever state they are in."""
        with self._snapshot():
            first = self._manifests("generation", number)
            second = self._manifests("generation_copy", number)
        return [
            Row(
                at,
                tuple(table[at] for table in (first, second) if at in table),
                at in first and at in second,
            )
            for at in sorted({*first, *second})
        ]

    def _manifests(self, table: str, number: int) -> Mapping[int, tuple[str, bytes]]:
        found: dict[int, tuple[str, bytes]] = {}
        query = f"SELECT number, digest, manifest FROM {table} WHERE number > ? ORDER BY number"
        try:
            for at, digest, text in self.connection.execute(query, (number,)):
                found[at] = (str(digest), text if isinstance(text, bytes) else b"")
        except sqlite3.DatabaseError as error:
            # A damaged page ends the scan; the other copy may still have the rest.
            if not _is_damage(error):
                raise
        return found

    def insert_generation(
        self, number: int, parent: int | None, digest: str, manifest: bytes
    ) -> None:
        """Appends a generation, twice."""
        self.connection.execute(
            "INSERT INTO generation VALUES (?, ?, ?, ?)", (number, parent, digest, manifest)
        )
        self.connection.execute(
            "INSERT INTO generation_copy VALUES (?, ?, ?)", (number, digest, manifest)
        )

    def put_objects(self, objects: Iterable[StoredObject]) -> None:
        """Records where contents are, in place of what was recorded before."""
        objects = list(objects)
        sealed = [item for item in objects if item.sealed]
        if sealed:
            self._sealed, self._newest = True, sealed[-1]
        self.connection.executemany(
            f"INSERT OR REPLACE INTO object ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (tuple(getattr(item, column) for column in _COLUMNS.split(", ")) for item in objects),
        )

    def mark_collected(self, digests: Iterable[str], when: str) -> None:
        """Records that contents are gone on purpose."""
        self._newest_at = -1
        self.connection.executemany(
            "UPDATE object SET content = NULL, collected_at = ? WHERE digest = ?",
            ((when, digest) for digest in digests),
        )

    def object(self, digest: str) -> StoredObject | None:
        """Returns where a content is, None when the index does not know it."""
        with self.translated():
            row = self.connection.execute(
                f"SELECT {_COLUMNS} FROM object WHERE digest = ?", (digest,)
            ).fetchone()
        return None if row is None else _stored_object(row)

    def objects(self) -> list[StoredObject]:
        """Returns every content the index knows; empty bytes stand for those it holds itself."""
        columns = _COLUMNS.replace("content", "CASE WHEN content IS NULL THEN NULL ELSE x'' END")
        with self.translated():
            rows = self.connection.execute(f"SELECT {columns} FROM object ORDER BY digest")
            return [_stored_object(row) for row in rows]

    def newest_sealed(self) -> StoredObject | None:
        """Returns the sealed content that was recorded last, None when there is none."""
        # Every commit with a key asks; it is looked for only after another connection has written.
        with self.translated():
            (version,) = self.connection.execute("PRAGMA data_version").fetchone()
            if self._newest_at != version:
                row = self.connection.execute(
                    f"SELECT {_COLUMNS} FROM object WHERE sealed AND collected_at IS NULL "
                    "ORDER BY created_at DESC LIMIT 1"
                ).fetchone()
                self._newest = None if row is None else _stored_object(row)
                self._newest_at = version
        return self._newest

    def has_sealed(self) -> bool:
        """Returns whether any content is sealed."""
        # Every commit without a key asks. A scan takes 4 ms at 10,000 contents, five times what the
        # commit takes, so it is repeated only after another connection has written.
        with self.translated():
            (version,) = self.connection.execute("PRAGMA data_version").fetchone()
            if self._sealed_at != version and not self._sealed:
                query = "SELECT 1 FROM object WHERE sealed LIMIT 1"
                self._sealed = self.connection.execute(query).fetchone() is not None
                self._sealed_at = version
        return self._sealed

    def integrity(self, *, deep: bool) -> list[str]:
        """Returns what SQLite itself finds wrong with the file."""
        pragma = "integrity_check" if deep else "quick_check"
        try:
            found = [str(row[0]) for row in self.connection.execute(f"PRAGMA {pragma}(20)")]
            found += [
                f"row {row[1]} of {row[0]} refers to nothing"
                for row in self.connection.execute("PRAGMA foreign_key_check")
            ]
        except sqlite3.DatabaseError as error:
            return [str(error)]
        return [text for text in found if text != "ok"]


def _connect(path: Path, *, read_only: bool, timeout_s: float) -> tuple[sqlite3.Connection, bool]:
    """Returns the open file, and whether it shows no commit that is made while it is read."""
    if not read_only:
        return _prepared(path, "rwc", timeout_s), False
    try:
        connection = _prepared(path, "ro", timeout_s)
    except sqlite3.OperationalError as error:
        if not any(_name(error).startswith(name) for name in _NO_ROOM):
            raise
    else:
        return connection, False
    # SQLite cannot make its shared memory, on a read-only disk for one, and so nobody else has it.
    wal = path.with_name(f"{path.name}-wal")
    if wal.exists() and wal.stat().st_size:
        return _copied(path), True
    return _prepared(path, "ro&immutable=1", timeout_s), True


def _copied(path: Path) -> sqlite3.Connection:
    """Returns a copy in memory of an index whose log cannot be taken in where it is."""
    memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    try:
        with tempfile.TemporaryDirectory(prefix="forge-index-") as scratch:
            for part in (path, path.with_name(f"{path.name}-wal")):
                shutil.copyfile(part, Path(scratch) / part.name)
            with contextlib.closing(sqlite3.connect(Path(scratch) / path.name)) as source:
                source.execute("PRAGMA journal_mode = DELETE")
                source.backup(memory)
        _set_up(memory, read_only=True)
    except BaseException:
        memory.close()
        raise
    return memory


def _prepared(path: Path, query: str, timeout_s: float) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={query}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=timeout_s,
    )
    try:
        _set_up(connection, read_only=query != "rwc")
    except BaseException:
        connection.close()
        raise
    return connection


def _set_up(connection: sqlite3.Connection, *, read_only: bool) -> None:
    # A flipped byte must not turn into an error of the text decoder.
    connection.text_factory = lambda data: data.decode("utf-8", errors="replace")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA foreign_keys = ON")
    if read_only:
        connection.execute("PRAGMA schema_version")  # What opens the file and its log.
        return
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def _stored_object(row: tuple[object, ...]) -> StoredObject:
    digest, size, sealed, stored, stored_size, created_at, collected_at, prefixes, content = row
    return StoredObject(
        digest=str(digest),
        size=int(size),  # type: ignore[call-overload]
        prefixes=bytes(prefixes),  # type: ignore[call-overload]
        content=content if isinstance(content, bytes) else None,
        stored=str(stored),
        stored_size=int(stored_size),  # type: ignore[call-overload]
        sealed=int(sealed),  # type: ignore[call-overload]
        created_at=float(created_at),  # type: ignore[arg-type]
        collected_at=None if collected_at is None else str(collected_at),
    )


def _name(error: sqlite3.Error) -> str:
    return str(getattr(error, "sqlite_errorname", "") or "")


def _is_damage(error: sqlite3.Error) -> bool:
    return any(_name(error).startswith(name) for name in _DAMAGED)


def _translation(path: Path, error: sqlite3.Error) -> ForgeError:
    if any(_name(error).startswith(name) for name in _BUSY):
        return StoreLockedError(
            f"The index {path} is busy in another process. Wait for it to end, or stop it."
        )
    if _is_damage(error):
        return DamagedStateError(
            f"The index {path} is damaged: {error}. Restore it from backups/ or from a copy of the "
            "store; the contents in objects/ are untouched.",
            path=str(path),
        )
    if any(_name(error).startswith(name) for name in _UNWRITABLE):
        return StateError(
            f"The index {path} cannot be written: {error}. Nothing was committed; check the "
            "permissions of its directory, or copy the store to where it can be written."
        )
    return StateError(
        f"The index {path} could not be read or written: {error}. Nothing was committed; free "
        "space or check the disk, then try again."
    )
