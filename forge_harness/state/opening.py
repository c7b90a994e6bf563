"""What a directory is before it is opened as a store; nothing here changes one that is not ours."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from forge_harness.errors import (
    DamagedStateError,
    NewerSchemaError,
    NotAStoreError,
    StateError,
    UnknownStateError,
)
from forge_harness.probes.filesystem import file_system_type, is_network

from .fs import Fs
from .head import HEAD, LOSSES, read_head
from .schema import APPLICATION_ID, VERSION, read_header

INDEX = "index.db"
NAMES = frozenset(
    {"objects", "tmp", "quarantine", "backups", "keys", "lock", HEAD, LOSSES}
    | {INDEX, f"{INDEX}-wal", f"{INDEX}-shm", f"{INDEX}-journal"}
)
"""What a store may hold before it has an index."""


def examine(root: Path, *, create: bool) -> int:
    """Returns the schema of the store in a directory; 0 where one may be made.

    Raises:
        UnknownStateError: There is none and none may be made.
        NotAStoreError: Something else is there, or the file system is on another machine.
        NewerSchemaError: A newer release wrote it.
        DamagedStateError: The index is gone or is no database any more.
        StateError: It cannot be looked at.
    """
    try:
        _refuse_network(root)
        if not root.is_dir():
            if root.exists() or root.is_symlink():
                raise NotAStoreError(f"{root} is not a directory; expected one for a state store.")
            version = 0
        else:
            version = _version(root)
    except OSError as error:
        raise StateError(
            f"{error.filename or root} cannot be looked at: {error.strerror}. Check what it is and "
            "its permissions."
        ) from error
    if version == 0 and not create:
        raise UnknownStateError(
            f"There is no state store at {root}. Check the path, or commit something first."
        )
    return version


def check_version(root: Path, version: int) -> None:
    """Refuses what a newer release wrote.

    Raises:
        NewerSchemaError: With both versions.
    """
    if version > VERSION:
        raise NewerSchemaError(
            f"The state store at {root} has schema {version}; this release reads up to {VERSION}. "
            "Upgrade bitnet-forge-harness."
        )


def make_directories(root: Path, fs: Fs) -> None:
    """Makes a directory and its missing parents, durably.

    Raises:
        OSError: The file system refused.
    """
    missing = []
    path = root.absolute()
    while not path.exists():
        missing.append(path)
        path = path.parent
    # Whoever made the first one that is there may have been killed before its name was durable.
    with contextlib.suppress(PermissionError):
        fs.fsync_dir(path.parent)
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):  # Another process does the same.
            fs.mkdir(directory)
        fs.fsync_dir(directory.parent)


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Turns errors of the operating system into one sentence.

    Raises:
        StateError: It refused something.
    """
    try:
        yield
    except OSError as error:
        name = f" ({error.filename})" if error.filename else ""
        raise StateError(
            f"{what}: {error.strerror or error}{name}. Free space, check the permissions or the "
            "disk, then try again."
        ) from error


def _refuse_network(root: Path) -> None:
    path = root.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    kind = file_system_type(path)
    if is_network(kind):
        raise NotAStoreError(
            f"{root} is on a {kind} file system, where locks and renames of two machines do not "
            "exclude each other; expected a local disk. Choose another directory."
        )


def _version(root: Path) -> int:
    path = root / INDEX
    header = read_header(path)
    # A power cut during creation may leave a torn first page, and the journal that undoes it.
    undone = path.with_name(f"{INDEX}-journal").exists()
    if (
        header is None
        or (header.is_sqlite and header.application_id == 0)
        or (not header.is_sqlite and undone)
    ):
        return _unfinished(root, path)
    if not header.is_sqlite:
        if (root / "objects").is_dir():
            raise DamagedStateError(
                f"The index {path} is damaged: it does not begin like a database. Restore it from "
                "backups/ or from a copy of the store; the contents in objects/ are untouched.",
                path=str(path),
            )
        raise NotAStoreError(f"{path} is not an index of a state store. Choose another directory.")
    if header.application_id != APPLICATION_ID:
        raise NotAStoreError(
            f"{path} is a database of another application (id {header.application_id:#x}). Choose "
            "another directory."
        )
    check_version(root, header.version)
    return header.version


def _unfinished(root: Path, path: Path) -> int:
    """The schema of an index whose file does not name its application: what SQLite makes of it."""
    if path.exists() and path.stat().st_size:
        version, application_id, tables = _read_index(path)
        if application_id == APPLICATION_ID:
            check_version(root, version)
            return version
        if version or tables:
            raise NotAStoreError(
                f"{path} is a database of another application (id {application_id:#x}). Choose "
                "another directory."
            )
    foreign = sorted(entry.name for entry in root.iterdir() if entry.name not in NAMES)
    if foreign:
        raise NotAStoreError(
            f"{root} holds {foreign[0]!r} and no state store; expected an empty directory or one. "
            "Choose another directory."
        )
    objects, head = root / "objects", read_head(root)
    if head.number or not head.is_legible or (objects.is_dir() and any(objects.iterdir())):
        raise DamagedStateError(
            f"The index {path} is missing or empty, and the store had generation {head.number}. "
            "Restore it from a copy of the store; nothing was changed.",
            path=str(path),
        )
    return 0


def _read_index(path: Path) -> tuple[int, int, int]:
    """Schema, application and number of tables, what its logs would make of it included.

    On a copy: what turns out to be another application's or a newer release's stays as it is, and a
    transaction that was cut off can be rolled back only where one may write.
    """
    with tempfile.TemporaryDirectory(prefix="forge-index-") as scratch:
        for suffix in ("", "-wal", "-journal"):
            if (part := path.with_name(path.name + suffix)).exists():
                shutil.copyfile(part, Path(scratch) / part.name)
        try:
            with contextlib.closing(sqlite3.connect(Path(scratch) / path.name)) as c:
                version, application_id, tables = (
                    int(c.execute(query).fetchone()[0])
                    for query in (
                        "PRAGMA user_version",
                        "PRAGMA application_id",
                        "SELECT count(*) FROM sqlite_master",
                    )
                )
        except sqlite3.DatabaseError as error:
            raise DamagedStateError(
                f"The index {path} is damaged: {error}. Restore it from a copy of the store.",
                path=str(path),
            ) from error
    return version, application_id, tables
