"""The file of an audit log: SQLite with triggers that let records be added and nothing else.

The triggers stop mistakes, not somebody who can write the file; that is what the chain and the
signed heads are for.
"""

from __future__ import annotations

import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from forge_harness.canonical import canonical_json, read_canonical
from forge_harness.durable import identity_of, sync_directory
from forge_harness.errors import AuditError, ExitCode
from forge_harness.forks import never_free

from .audit_events import AuditEvent, AuditRecord, Decision

APPLICATION_ID = 0x46484155
"""PRAGMA application_id: "FHAU"."""
VERSION = 1
_LAYOUT = """
CREATE TABLE log (id TEXT NOT NULL) STRICT;
CREATE TABLE event (
  number INTEGER PRIMARY KEY,
  time TEXT NOT NULL,
  actor TEXT NOT NULL,
  action TEXT NOT NULL,
  resource TEXT NOT NULL,
  decision TEXT NOT NULL CHECK (decision IN ('allow', 'deny', 'error')),
  request_id TEXT NOT NULL,
  detail TEXT NOT NULL,
  previous BLOB NOT NULL CHECK (length(previous) = 32),
  mac BLOB NOT NULL CHECK (length(mac) = 32)
) STRICT;
CREATE TRIGGER event_stays BEFORE UPDATE ON event
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER event_remains BEFORE DELETE ON event
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER event_follows BEFORE INSERT ON event
WHEN NEW.number <> (SELECT COALESCE(MAX(number), 0) + 1 FROM event)
  OR NEW.previous IS NOT
    COALESCE((SELECT mac FROM event WHERE number = NEW.number - 1), NEW.previous)
BEGIN SELECT RAISE(ABORT, 'the record does not follow the last one'); END;
CREATE TRIGGER log_stays BEFORE UPDATE ON log
BEGIN SELECT RAISE(ABORT, 'the audit log keeps its id'); END;
CREATE TRIGGER log_remains BEFORE DELETE ON log
BEGIN SELECT RAISE(ABORT, 'the audit log keeps its id'); END;
"""
_COLUMNS = "number, time, actor, action, resource, decision, request_id, detail, previous, mac"
_BUSY_MS = 10_000
_REFUSED = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
)
"""What the system says, and nothing about what the file holds."""
_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100
_ID_AT, _VERSION_AT = slice(68, 72), slice(60, 64)
"""Where the header of an SQLite file has application_id and user_version."""


class NotAnAuditLogError(AuditError):
    """What was named is no audit log, or none can be at that place."""

    exit_code = ExitCode.USAGE


class DamagedAuditError(AuditError):
    """The file is an audit log, and does not hold what was recorded any more."""

    exit_code = ExitCode.VERIFICATION_FAILED


class AuditFile:
    """An open file of records. Any thread may use it, one at a time.

    Args:
        path: Made when it is not there, unless read only.
        read_only: Whether nothing is ever written.

    Raises:
        NotAnAuditLogError: It is no audit log, a newer one, or cannot be opened.
        DamagedAuditError: It was one.
        AuditError: Another process keeps it locked.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        try:
            self._connection = self._open(read_only)
        except (sqlite3.Error, OSError) as error:
            raise NotAnAuditLogError(
                f"The audit log {str(path)!r} cannot be opened ({error}); check the path, the "
                "permissions and the disk."
            ) from error
        try:
            self._prepare(read_only)
        except BaseException:
            self._connection.close()
            raise
        self._place = path.absolute()
        self._identity = identity_of(self._place)

    def close(self) -> None:
        """Closes the file; every record returned from `append` is on disk already."""
        self._connection.close()

    def disown(self) -> None:
        """Gives the file up without closing it; for a child of fork, whose parent has it open."""
        never_free(self._connection)

    @property
    def log_id(self) -> str:
        """Random id of this log, 32 hexadecimal digits."""
        try:
            row = self._connection.execute("SELECT id FROM log").fetchone()
        except sqlite3.Error as error:
            raise self._unreadable(error) from error
        return "" if row is None else str(row[0])

    def append(
        self, follow: Callable[[AuditRecord | None], Sequence[AuditRecord]]
    ) -> Sequence[AuditRecord]:
        """Adds records in one durable transaction: all of them or none.

        Args:
            follow: Makes the records from the newest one; no other process adds one meanwhile.

        Raises:
            AuditError: The file system or a trigger refused; none was added.
        """
        try:
            with self._transaction():
                self.check_place()
                records = follow(self.last())
                self._connection.executemany(
                    f"INSERT INTO event ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    map(_row, records),
                )
            return records
        except (sqlite3.Error, OSError) as error:
            raise AuditError(
                f"The audit log {str(self.path)!r} took no record ({error}), so what was to be "
                "recorded was not done; free space or mend the log."
            ) from error

    def check_place(self) -> None:
        """Refuses to go on in a file that nobody finds any more, or takes for an older one.

        Raises:
            AuditError: It was moved, removed or replaced; SQLite itself would not notice.
        """
        if identity_of(self._place) != self._identity:
            raise AuditError(
                f"The audit log {str(self.path)!r} was moved, removed or replaced since it was "
                "opened, so nothing is recorded; put it back, or start again what writes it."
            )

    def last(self) -> AuditRecord | None:
        """Returns the newest record."""
        return next(self._select("ORDER BY number DESC LIMIT 1"), None)

    def newest(self, count: int) -> list[AuditRecord]:
        """Returns the newest records, oldest first."""
        return list(self._select("ORDER BY number DESC LIMIT ?", count))[::-1]

    def records(self) -> Iterator[AuditRecord]:
        """Yields every record by number.

        Raises:
            AuditError: The file is damaged.
        """
        return self._select("ORDER BY number")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            # A full disk may have rolled back already.
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise

    def _select(self, rest: str, *values: object) -> Iterator[AuditRecord]:
        try:
            for row in self._connection.execute(f"SELECT {_COLUMNS} FROM event {rest}", values):
                yield _record(row)
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> AuditError:
        """Returns what to raise for a failed look into a log that is one."""
        if _is_busy(error):
            return AuditError(
                f"The audit log {str(self.path)!r} cannot be read ({error}); try again when the "
                "process that writes it is done."
            )
        if _code_of(error) in _REFUSED:
            return NotAnAuditLogError(
                f"The audit log {str(self.path)!r} cannot be used ({error}); free space, or check "
                "the permissions and the disk."
            )
        return DamagedAuditError(
            f"The audit log {str(self.path)!r} cannot be read ({error}): it is damaged; keep "
            "it and compare with a copy."
        )

    def _open(self, read_only: bool) -> sqlite3.Connection:
        if read_only and not self.path.is_file():
            is_there = self.path.exists()
            raise FileNotFoundError("it is no file" if is_there else "there is no such file")
        made = not self.path.exists()
        if made:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = _connected(self.path, "ro" if read_only else "rwc")
        try:
            if read_only and not _is_readable_in_place(connection):
                connection.close()
                return _still(self.path)
            if made:
                sync_directory(self.path.parent)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, read_only: bool) -> None:
        """Refuses a file of somebody else before anything of it is changed."""
        try:
            found = self._pragma("application_id"), self._pragma("user_version")
            if found == (0, 0) and not read_only and self._is_empty():
                self._create()
            elif found != (APPLICATION_ID, VERSION):
                if self._was_ours():
                    raise self._unreadable(ValueError("its head is gone"))
                raise NotAnAuditLogError(
                    f"{str(self.path)!r} is no audit log of version {VERSION} (application "
                    f"{found[0]:#x}, version {found[1]}); name another file, or use the version "
                    "that wrote it."
                )
            if not read_only:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error as error:
            if _is_busy(error) or _code_of(error) in _REFUSED or self._was_ours():
                raise self._unreadable(error) from error
            raise NotAnAuditLogError(
                f"{str(self.path)!r} is no audit log ({error}); name another file."
            ) from error

    def _was_ours(self) -> bool:
        """Whether a file that cannot be taken for a log was one: it says so, or has its heads.

        A newer version's log is whole, only not for us.
        """
        try:
            if not self.path.is_file():  # a pipe would be waited for
                return False
            with self.path.open("rb") as stream:
                header = stream.read(_HEADER_BYTES)
        except OSError:
            return False
        if len(header) == _HEADER_BYTES and header.startswith(_MAGIC):
            ours = header[_ID_AT] == APPLICATION_ID.to_bytes(4, "big")
            return ours and header[_VERSION_AT] == VERSION.to_bytes(4, "big")
        return self.path.with_name(f"{self.path.name}.heads").is_file()

    def _create(self) -> None:
        with self._transaction():
            if not self._is_empty():  # another process was first
                return
            for statement in _statements(_LAYOUT):
                self._connection.execute(statement)
            self._connection.execute("INSERT INTO log VALUES (?)", (secrets.token_hex(16),))
            self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {VERSION}")

    def _is_empty(self) -> bool:
        return self._connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])


def _connected(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
        connection.execute("PRAGMA trusted_schema = OFF")
    except BaseException:
        connection.close()
        raise
    return connection


def _is_readable_in_place(connection: sqlite3.Connection) -> bool:
    """Whether SQLite can put beside the file what it needs to read it; on a read-only disk not."""
    try:
        connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        return _code_of(error) not in _REFUSED
    return True


def _still(path: Path) -> sqlite3.Connection:
    """Opens a log beside which nothing can be written, and which nobody can write therefore."""
    wal = path.with_name(f"{path.name}-wal")
    if not wal.exists() or not wal.stat().st_size:
        return _connected(path, "ro&immutable=1")
    # What is in its write-ahead log can be taken in by a copy only.
    memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    try:
        with tempfile.TemporaryDirectory(prefix="forge-audit-") as scratch:
            for part in (path, wal):
                shutil.copyfile(part, Path(scratch) / part.name)
            with closing(sqlite3.connect(Path(scratch) / path.name)) as copy:
                copy.execute("PRAGMA journal_mode = DELETE")
                copy.backup(memory)
    except BaseException:
        memory.close()
        raise
    return memory


def _is_busy(error: Exception) -> bool:
    return _code_of(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _code_of(error: Exception) -> int:
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)) & 0xFF


def _statements(layout: str) -> Iterator[str]:
    pending = ""
    for line in layout.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""


def _row(record: AuditRecord) -> tuple[object, ...]:
    event = record.event
    return (
        record.number,
        event.time,
        event.actor,
        event.action,
        event.resource,
        str(event.decision),
        event.request_id,
        canonical_json(dict(event.detail)).decode(),
        record.previous,
        record.mac,
    )


def _detail(text: str) -> dict[Any, Any]:
    """Returns the detail a text is; of one that was written otherwise, what no MAC is over.

    The MAC is over what was read: a key twice or a list of pairs would read as what was recorded,
    and as something else to others.
    """
    with suppress(ValueError, TypeError, RecursionError):
        found = read_canonical(text)
        if isinstance(found, dict) and canonical_json(found).decode() == text:
            return found
    return {_OTHERWISE: text}


_OTHERWISE = 0
"""A key that no event can have."""


def _record(row: Sequence[object]) -> AuditRecord:
    number, time, actor, action, resource, decision, request_id, detail, previous, mac = row
    event = AuditEvent(
        actor=str(actor),
        action=str(action),
        resource=str(resource),
        decision=Decision(str(decision)),
        request_id=str(request_id),
        detail=_detail(str(detail)),
        time=str(time),
    )
    if not (isinstance(number, int) and isinstance(previous, bytes) and isinstance(mac, bytes)):
        raise TypeError(f"record {number!r} has values of other types")
    return AuditRecord(number, event, previous, mac)
