"""Audit logs that do not show tampering, and actions that are done without a record."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.subject.reference import ReferenceSubject

_ANCHOR = "anchor"


class Ledger:
    """A log of its own make: rows, chained by a plain hash and anchored when asked to."""

    def __init__(self, path: Path, *, chained: bool, anchored: bool) -> None:
        self.path, self.chained, self.anchored = path, chained, anchored
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS record (n INTEGER PRIMARY KEY, actor TEXT, action TEXT,"
            " resource TEXT, link TEXT)"
        )

    def add(self, actor: str, action: str, resource: str) -> None:
        """See `AuditWriter.add`."""
        last = self.connection.execute("SELECT n, link FROM record ORDER BY n DESC").fetchone()
        n, link = last or (0, "")
        link = _chain(n + 1, actor, action, resource, link) if self.chained else ""
        self.connection.execute(
            "INSERT INTO record VALUES (?, ?, ?, ?, ?)", (n + 1, actor, action, resource, link)
        )
        if self.anchored:
            self.path.with_name(_ANCHOR).write_text(link)

    def close(self) -> None:
        """See `AuditWriter.close`."""
        self.connection.close()


def _chain(n: int, actor: str, action: str, resource: str, link: str) -> str:
    return hashlib.sha256(f"{n}|{actor}|{action}|{resource}|{link}".encode()).hexdigest()


class KeepsLedger(ReferenceSubject):
    """The reference subject with a log of another make."""

    chained, anchored = True, True

    def audit_log(self, path: Path) -> Any:
        """See `KeepsAuditLog.audit_log`."""
        return Ledger(path, chained=self.chained, anchored=self.anchored)

    def audit_problems(self, path: Path) -> Sequence[str]:
        """See `KeepsAuditLog.audit_problems`."""
        with closing(sqlite3.connect(path)) as connection:
            rows = connection.execute("SELECT * FROM record ORDER BY n").fetchall()
        if not self.chained:
            numbers = [row[0] for row in rows]
            return [] if numbers == list(range(1, len(rows) + 1)) else ["gap"]
        link, problems = "", []
        for position, (n, actor, action, resource, found) in enumerate(rows, 1):
            link = _chain(n, actor, action, resource, link)
            if n != position or link != found:
                problems.append(f"record {n}")
        if self.anchored and path.with_name(_ANCHOR).read_text() != link:
            problems.append("the end is not the anchored one")
        return problems


class Unchained(KeepsLedger):
    """Records are numbered and not chained."""

    chained, anchored = False, False


class Unanchored(KeepsLedger):
    """Records are chained, and nothing outside the file says where the chain ends."""

    anchored = False


class HeadsNotVerified(ReferenceSubject):
    """The signed heads are written, and the verification looks at the chain alone."""

    def audit_problems(self, path: Path) -> Sequence[str]:
        """See `KeepsAuditLog.audit_problems`."""
        return [p for p in super().audit_problems(path) if "ead " not in p]


class ActsFirst(ReferenceSubject):
    """Acts, and records it afterwards."""

    def audited(self, path: Path, action: Callable[[], None]) -> None:
        """See `KeepsAuditLog.audited`."""
        action()
        super().audited(path, lambda: None)


class CarriesOn(ReferenceSubject):
    """Logs the failure to log, as most applications do."""

    def audited(self, path: Path, action: Callable[[], None]) -> None:
        """See `KeepsAuditLog.audited`."""
        with contextlib.suppress(Exception):
            super().audited(path, lambda: None)
        action()


def verdicts(subject: Any) -> object:
    """Whether a log of six records has problems: as written, edited, cut off, and put back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audit.db"
        _write(subject, path, 5)
        before = path.read_bytes()
        _write(subject, path, 1)
        after = path.read_bytes()
        seen = [bool(subject.audit_problems(path))]
        table, number, text = _layout(path)
        for statement in (
            f"UPDATE {table} SET {text} = 'nobody' WHERE {number} = 2",
            f"DELETE FROM {table} WHERE {number} = 6",
        ):
            path.write_bytes(after)
            with closing(sqlite3.connect(path)) as connection, connection:
                for (trigger,) in connection.execute(
                    "SELECT name FROM sqlite_master WHERE type = 'trigger'"
                ).fetchall():
                    connection.execute(f"DROP TRIGGER {trigger}")
                connection.execute("PRAGMA ignore_check_constraints = ON")
                connection.execute(statement)
            seen.append(_is_suspect(subject, path))
        path.write_bytes(before)
        return [*seen, _is_suspect(subject, path)]


def _write(subject: Any, path: Path, count: int) -> None:
    writer = subject.audit_log(path)
    for number in range(count):
        writer.add(f"actor {number}", "save", "model")
    writer.close()
    # The bytes of the file alone are the log: nothing may wait in SQLite's.
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")


def _layout(path: Path) -> tuple[str, str, str]:
    """The table of the records, the column that numbers them, and one with text."""
    with closing(sqlite3.connect(path)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        (table,) = (name for (name,) in tables.fetchall() if name in ("record", "event"))
        columns = connection.execute(f"PRAGMA table_info({table})").fetchall()
    number = next(name for _, name, kind, *_ in columns if kind.upper().startswith("INT"))
    return table, number, next(name for _, name, *_ in columns if name == "actor")


def _is_suspect(subject: Any, path: Path) -> bool:
    try:
        return bool(subject.audit_problems(path))
    except Exception:  # A log that cannot be read any more is under suspicion too.
        return True


def done_without_a_record(subject: Any) -> object:
    """Whether an action is done where a file is in the way of the log, and where none is."""
    done: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "file").write_text("no folder")
        for name in ("file/audit.db", "audit.db"):
            with contextlib.suppress(Exception):
                subject.audited(Path(folder) / name, partial(done.append, name))
    return done


_SEEDED = partial(Defect, stage=Stage.SECURITY)


DEFECTS: tuple[Defect, ...] = (
    _SEEDED(
        id="X12_records_not_chained",
        title="The audit log numbers its records and does not chain them",
        check="security.audit_tamper",
        shows="actor changed",
        subject=Unchained,
        alive=verdicts,
        subtlety=3,
    ),
    _SEEDED(
        id="X12_chain_not_anchored",
        title="The audit log is chained, and nothing outside of it says where it ends",
        check="security.audit_tamper",
        shows="the last removed",
        subject=Unanchored,
        alive=verdicts,
        subtlety=4,
    ),
    _SEEDED(
        id="X12_heads_not_verified",
        title="Signed heads of the audit log are written, and never looked at",
        check="security.audit_tamper",
        shows="the last removed",
        subject=HeadsNotVerified,
        alive=verdicts,
        subtlety=5,
    ),
    _SEEDED(
        id="X12_acts_before_its_record",
        title="An action is done, and recorded afterwards",
        check="security.audit_fail_closed",
        shows="done_without_room is True",
        subject=ActsFirst,
        alive=done_without_a_record,
        subtlety=3,
    ),
    _SEEDED(
        id="X12_carries_on_without_a_record",
        title="An action is done though it could not be recorded",
        check="security.audit_fail_closed",
        shows="done_without_room is True",
        subject=CarriesOn,
        alive=done_without_a_record,
        subtlety=2,
    ),
)
"""Logs."""

BENIGN: tuple[Benign, ...] = (
    Benign(
        id="audit_log_of_another_make",
        title="The audit log is a chained table with an anchor beside it",
        subject=KeepsLedger,
        checks=("security.audit_tamper",),
    ),
)
