"""Older layouts of the index, brought forward one schema at a time.

    1  states and files in tables of their own; no metadata, no running digests, no lineage
    2  a manifest a generation, append-only, with metadata; running digests of large contents
    3  manifests kept twice, parents of states, contents in the index, sealed contents, collection

Each step is one transaction that raises PRAGMA user_version, so a kill leaves a whole schema and
the next open goes on. Before the first step the index is copied to backups/, durably. Digests of
old manifests never change: what they covered is read as it was written.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from forge_harness.canonical import canonical_json, file_sha256

from .fs import Fs
from .schema import LAYOUT, VERSION, execute_all, version_of

_LAYOUT_2 = """
CREATE TABLE generation (
  number INTEGER PRIMARY KEY,
  digest TEXT NOT NULL,
  manifest BLOB NOT NULL
) STRICT;
CREATE TABLE object (
  digest TEXT PRIMARY KEY,
  size INTEGER NOT NULL,
  prefixes BLOB NOT NULL
) STRICT;
CREATE TRIGGER generation_stays BEFORE UPDATE ON generation
BEGIN SELECT RAISE(ABORT, 'generations are append-only'); END;
CREATE TRIGGER generation_remains BEFORE DELETE ON generation
BEGIN SELECT RAISE(ABORT, 'generations are append-only'); END;
"""


def migrate(connection: sqlite3.Connection, root: Path, fs: Fs) -> None:
    """Brings an index to the newest schema. The exclusive lock is held.

    Raises:
        sqlite3.Error: A step failed; the index is as it was before the step.
        OSError: The backup could not be made; the index is as it was.
    """
    back_up(connection, root, fs)
    while (version := version_of(connection)) < VERSION:
        connection.execute("BEGIN IMMEDIATE")
        try:
            STEPS[version](connection)
            connection.execute(f"PRAGMA user_version = {version + 1}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def back_up(connection: sqlite3.Connection, root: Path, fs: Fs) -> Path:
    """Copies the index as it is to backups/, durably, and returns the copy.

    A copy of the same index that is there already is enough: an earlier try was killed after it.
    One of another index is no reason to keep none of this one.
    """
    directory = root / "backups"
    temp = root / "tmp" / f"backup-{secrets.token_hex(8)}"
    try:
        connection.execute("VACUUM INTO ?", (str(temp),))
        handle = fs.open(temp)
        try:
            fs.fsync(handle)
        finally:
            fs.close(handle)
        if not fs.exists(directory):
            fs.mkdir(directory)
        fs.fsync_dir(root)
        target = _place_of(temp, directory / f"index-schema-{version_of(connection)}.db", fs)
        if fs.exists(target):
            fs.unlink(temp)
        else:
            fs.rename(temp, target)
        fs.fsync_dir(directory)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    return target


def _place_of(copy: Path, first: Path, fs: Fs) -> Path:
    """The name under which the same content is there already, or else the first free one."""
    target, number = first, 1
    while fs.exists(target) and file_sha256(target) != file_sha256(copy):
        number += 1
        target = first.with_name(f"{first.stem}-{number}.db")
    return target


def _to_2(connection: sqlite3.Connection) -> None:
    for table in ("generation", "object"):
        connection.execute(f"ALTER TABLE {table} RENAME TO {table}_1")
    execute_all(connection, _LAYOUT_2)
    rows = connection.execute(
        "SELECT number, parent_digest, digest, note, created_at FROM generation_1 ORDER BY number"
    ).fetchall()
    for number, parent, digest, note, created_at in rows:
        document = {
            "changes": _changes_1(connection, number),
            "created_at": created_at,
            "format": 1,
            "generation": number,
            "note": note,
            "parent": parent,
        }
        # Where this does not hash to the digest, the generation was damaged and stays so.
        connection.execute(
            "INSERT INTO generation VALUES (?, ?, ?)", (number, digest, canonical_json(document))
        )
    connection.execute("INSERT INTO object SELECT digest, size, x'' FROM object_1")
    for table in ("file", "state", "removal", "object_1", "generation_1"):
        connection.execute(f"DROP TABLE {table}")


def _changes_1(connection: sqlite3.Connection, number: int) -> list[dict[str, Any]]:
    """What a generation of schema 1 changed: states by phase and name, then removals."""
    changes: list[dict[str, Any]] = []
    for at, phase, kind, name in connection.execute(
        "SELECT id, phase, kind, name FROM state WHERE generation = ? ORDER BY phase, name",
        (number,),
    ).fetchall():
        files = {
            file: {"digest": digest, "size": size}
            for file, digest, size in connection.execute(
                "SELECT name, digest, size FROM file WHERE state = ?", (at,)
            )
        }
        state = {"id": at, "phase": phase, "kind": kind, "name": name, "files": files}
        changes.append({"action": "put", "state": state})
    changes += [
        {"action": "remove", "phase": phase, "name": name}
        for phase, name in connection.execute(
            "SELECT phase, name FROM removal WHERE generation = ? ORDER BY phase, name", (number,)
        )
    ]
    return changes


def _to_3(connection: sqlite3.Connection) -> None:
    for trigger in ("generation_stays", "generation_remains"):
        connection.execute(f"DROP TRIGGER {trigger}")
    for table in ("generation", "object"):
        connection.execute(f"ALTER TABLE {table} RENAME TO {table}_2")
    execute_all(connection, LAYOUT)
    numbers: dict[str, int] = {}
    rows = connection.execute(
        "SELECT number, digest, manifest FROM generation_2 ORDER BY number"
    ).fetchall()
    for number, digest, manifest in rows:
        parent = numbers.get(_parent(manifest))
        numbers[digest] = number
        connection.execute(
            "INSERT INTO generation VALUES (?, ?, ?, ?)", (number, parent, digest, manifest)
        )
        connection.execute(
            "INSERT INTO generation_copy VALUES (?, ?, ?)", (number, digest, manifest)
        )
    connection.execute(
        "INSERT INTO object SELECT digest, size, 0, digest, size, 0.0, NULL, prefixes, NULL "
        "FROM object_2"
    )
    for table in ("object_2", "generation_2"):
        connection.execute(f"DROP TABLE {table}")


def _parent(manifest: bytes) -> str:
    try:
        return str(json.loads(manifest)["parent"])
    except (ValueError, KeyError, TypeError):
        return ""


STEPS: Mapping[int, Callable[[sqlite3.Connection], None]] = {1: _to_2, 2: _to_3}
"""Schema -> what brings it to the next one."""
