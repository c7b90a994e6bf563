"""`manifest.json`: path, size and sha256 of every file of a directory, written last.

Layout: docs/formats.md, "Native 1.0". A file that is not listed is as wrong as one that differs:
what nobody vouches for must not be shipped.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from forge_harness.canonical import canonical_json, digest_of, file_sha256
from forge_harness.durable import write_durably
from forge_harness.errors import CheckpointError, DamagedCheckpointError

from .strict_json import read_object

MANIFEST = "manifest.json"
SCHEMA = "forge-manifest/1"
_KEYS = {"path", "bytes", "sha256"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One file.

    Attributes:
        path: Relative to the directory, forward slashes.
        bytes: Size.
        sha256: Lower-case hexadecimal digest of the content.
    """

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every file of a directory but the manifest itself, sorted by path."""

    files: tuple[ManifestEntry, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files listed."""
        return sum(entry.bytes for entry in self.files)

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of the canonical JSON of the list of files."""
        return digest_of(self._list())

    def to_bytes(self) -> bytes:
        """Returns the content of `manifest.json`."""
        return canonical_json({"schema": SCHEMA, "files": self._list()})

    def _list(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.files]


def write_manifest(directory: Path, known: Mapping[str, str] | None = None) -> Manifest:
    """Writes the manifest of a directory as it is now; one that was there is replaced.

    Args:
        directory: Its files must not change any more.
        known: Path -> sha256 of files whose digest was computed while they were written.

    Raises:
        CheckpointError: Something in the directory is no plain file, or has a name that other
            systems cannot have.
    """
    known = known or {}
    entries = []
    for path, (file, size) in _plain_files(directory, CheckpointError).items():
        if problem := _path_problem(path):
            raise CheckpointError(f"File {path!r} cannot be listed: {problem}; rename it.")
        entries.append(ManifestEntry(path, size, known.get(path) or file_sha256(file)))
    manifest = Manifest(tuple(entries))
    write_durably(directory / MANIFEST, manifest.to_bytes())
    return manifest


def verify_manifest(directory: Path) -> Manifest:
    """Compares a directory with its manifest, reading every file whole.

    Raises:
        DamagedCheckpointError: There is no manifest, it is malformed, or a file is missing, added,
            of another size or of another content. The message names the first.
    """
    manifest = read_manifest(directory)
    listed = {entry.path: entry for entry in manifest.files}
    found = _plain_files(directory, DamagedCheckpointError)
    for path in sorted(listed.keys() | found.keys()):
        if path not in found:
            _refuse(directory, f"{MANIFEST} lists {path!r}, and it is missing", path)
        if path not in listed:
            _refuse(directory, f"{path!r} is there, and {MANIFEST} does not list it", path)
        if found[path][1] != listed[path].bytes:
            _refuse(
                directory,
                f"{path!r} has {found[path][1]} bytes, {MANIFEST} says {listed[path].bytes}",
                path,
            )
    for path, entry in listed.items():
        digest = file_sha256(found[path][0])
        if digest != entry.sha256:
            _refuse(
                directory, f"{path!r} has sha256 {digest}, {MANIFEST} says {entry.sha256}", path
            )
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Returns what the manifest of a directory says; no file is compared with it.

    Raises:
        DamagedCheckpointError: There is none, or it is malformed.
    """
    path = directory / MANIFEST
    if path.is_symlink():
        _refuse(directory, f"{MANIFEST} is a symbolic link")
    content = read_object(path)
    if content.get("schema") != SCHEMA or set(content) != {"schema", "files"}:
        _refuse(
            directory,
            f"{MANIFEST} has keys {sorted(content)} and schema {content.get('schema')!r}; expected "
            f"files and schema {SCHEMA!r}",
        )
    if not isinstance(content["files"], list):
        _refuse(directory, f"'files' of {MANIFEST} is no list")
    entries = tuple(_entry(directory, value) for value in content["files"])
    for before, after in pairwise(entries):
        if before.path == after.path:
            _refuse(directory, f"{MANIFEST} lists {after.path!r} twice")
        if before.path > after.path:
            _refuse(directory, f"{MANIFEST} lists {after.path!r} after {before.path!r}; not sorted")
    return Manifest(entries)


def _entry(directory: Path, value: object) -> ManifestEntry:
    if not isinstance(value, dict) or set(value) != _KEYS:
        _refuse(
            directory, f"an entry of {MANIFEST} is {value!r}; expected {', '.join(sorted(_KEYS))}"
        )
    name, size, digest = value["path"], value["bytes"], value["sha256"]
    if not isinstance(name, str):
        _refuse(directory, f"{MANIFEST} has path {name!r}; expected a string")
    if problem := _path_problem(name):
        _refuse(directory, f"{MANIFEST} lists {name!r}: {problem}")
    if type(size) is not int or size < 0:
        _refuse(directory, f"{MANIFEST} says that {name!r} has {size!r} bytes; expected a count")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        _refuse(
            directory,
            f"{MANIFEST} has sha256 {digest!r} for {name!r}; expected 64 digits 0-f",
        )
    return ManifestEntry(name, size, digest)


def _path_problem(path: str) -> str:
    """What is wrong with a path, or "": it must mean the same file everywhere, below here."""
    if path == MANIFEST:
        return "a manifest does not list itself"
    if not path.isprintable() or "\\" in path or ":" in path:
        return "a path has printable characters, no backslash and no colon"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "a path is relative and stays below the directory"
    return ""


def _plain_files(directory: Path, error: type[CheckpointError]) -> dict[str, tuple[Path, int]]:
    """Returns path -> (file, size) of everything below but the manifest, sorted by path."""
    found: dict[str, tuple[Path, int]] = {}
    waiting = [(directory, "")]
    while waiting:
        folder, prefix = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as cause:
            raise error(
                f"{str(folder)!r} cannot be listed: {cause.strerror or cause}; it must be a "
                "directory that can be read."
            ) from cause
        for entry in entries:
            path = prefix + entry.name
            mode = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(mode.st_mode):
                waiting.append((Path(entry.path), f"{path}/"))
            elif not stat.S_ISREG(mode.st_mode):
                raise error(
                    f"{entry.path!r} is a {_kind(mode.st_mode)}; a package holds plain files only."
                )
            elif path != MANIFEST:
                found[path] = (Path(entry.path), mode.st_size)
    return dict(sorted(found.items()))


def _kind(mode: int) -> str:
    return "symbolic link" if stat.S_ISLNK(mode) else "device, pipe or socket"


def _refuse(directory: Path, what: str, path: str = MANIFEST) -> NoReturn:
    raise DamagedCheckpointError(
        f"{str(directory)!r} is damaged: {what}. Get the package again.",
        path=str(directory / path),
    )
