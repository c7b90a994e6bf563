"""The layout of the index: schema 3, and what tells it from other SQLite files."""

from __future__ import annotations

import sqlite3
import struct
from dataclasses import dataclass
from pathlib import Path

from forge_harness.durable import opened_plain

APPLICATION_ID = 0x46485354
"""PRAGMA application_id of every index: "FHST"."""
VERSION = 3
"""PRAGMA user_version of the layout below."""

LAYOUT = """
CREATE TABLE generation (
  number INTEGER PRIMARY KEY,
  parent INTEGER REFERENCES generation (number),
  digest TEXT NOT NULL,
  manifest BLOB NOT NULL
) STRICT;
CREATE TABLE generation_copy (
  number INTEGER PRIMARY KEY REFERENCES generation (number),
  digest TEXT NOT NULL,
  manifest BLOB NOT NULL
) STRICT;
CREATE TABLE object (
  digest TEXT PRIMARY KEY,
  size INTEGER NOT NULL,
  sealed INTEGER NOT NULL,
  stored TEXT NOT NULL,
  stored_size INTEGER NOT NULL,
  created_at REAL NOT NULL,
  collected_at TEXT,
  prefixes BLOB NOT NULL,
  content BLOB
) STRICT;
CREATE TRIGGER generation_follows BEFORE INSERT ON generation
WHEN NEW.number <> (SELECT COALESCE(MAX(number), 0) + 1 FROM generation)
BEGIN SELECT RAISE(ABORT, 'generations are numbered without gaps'); END;
CREATE TRIGGER generation_stays BEFORE UPDATE ON generation
BEGIN SELECT RAISE(ABORT, 'generations are append-only'); END;
CREATE TRIGGER generation_remains BEFORE DELETE ON generation
BEGIN SELECT RAISE(ABORT, 'generations are append-only'); END;
CREATE TRIGGER copy_stays BEFORE UPDATE ON generation_copy
BEGIN SELECT RAISE(ABORT, 'generations are append-only'); END;
CREATE TRIGGER copy_remains BEFORE DELETE ON generation_copy
BEGIN SELECT RAISE(ABORT, 'generations are append-only'); END;
"""
"""A manifest is kept twice: SQLite has no page checksums, and one damaged page must not hide all
generations after it."""

_HEADER = struct.Struct(">16s44xI4xI28x")
_MAGIC = b"SQLite format 3\0"


@dataclass(frozen=True, slots=True)
class Header:
    """What the first 100 bytes of a database file say, read without opening it as one."""

    is_sqlite: bool
    version: int
    """PRAGMA user_version."""
    application_id: int


def read_header(path: Path) -> Header | None:
    """Returns the header of an index file; None for none, or one a kill left empty.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        with opened_plain(path) as stream:
            head = stream.read(_HEADER.size)
    except FileNotFoundError:
        return None
    if not head:
        return None
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        return Header(False, 0, 0)
    _, version, application_id = _HEADER.unpack(head)
    return Header(True, version, application_id)


def execute_all(connection: sqlite3.Connection, statements: str) -> None:
    """Runs several statements in the transaction there is; `executescript` would end it."""
    pending = ""
    for line in statements.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            connection.execute(pending)
            pending = ""
    assert not pending.strip()


def create(connection: sqlite3.Connection) -> None:
    """Makes the layout in the transaction there is."""
    execute_all(connection, LAYOUT)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def version_of(connection: sqlite3.Connection) -> int:
    """Returns the schema of an open index; 0 when a kill left it without one."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
