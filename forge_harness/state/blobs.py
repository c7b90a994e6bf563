"""Contents as files: written once under the SHA-256 of their bytes, never changed, never replaced.

Order of a write: new temporary file, all bytes, fsync of the file (`stage`); rename to the final
name, fsync of its directory (`publish`). A name in objects/ is therefore whole or absent, and on
disk when `publish` returns. When an fsync fails the file is given up: the kernel may have dropped
the pages and would call a second try a success.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from forge_harness.errors import StateError

from .fs import Fs, write_all
from .hashing import CHUNK_BYTES, StreamDigest, ThreadedDigest
from .sealer import Sealer

_NAME = re.compile(r"[0-9a-f]{64}")
CONTEXT = b"forge-harness state content"
"""Bound into every sealed content. Which content it is follows from its digest."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A content that is whole and on disk under a temporary name."""

    temp: Path
    digest: str
    """SHA-256 of the plaintext."""
    size: int
    prefixes: bytes
    name: str
    """SHA-256 of the bytes in the file, without `head` at its start."""
    stored_size: int
    head: int
    """Bytes at the start that a change of key rewrites."""


class Blobs:
    """The files below objects/, tmp/ and quarantine/ of one store."""

    def __init__(self, root: Path, fs: Fs, sealer: Sealer | None = None) -> None:
        self.objects = root / "objects"
        self.temporary = root / "tmp"
        self.quarantined = root / "quarantine"
        self.fs = fs
        self.sealer = sealer
        self._durable_directories: set[Path] = set()

    def create(self) -> None:
        """Makes the directories there are not yet; the caller makes their names durable."""
        for path in (self.objects, self.temporary, self.quarantined):
            with contextlib.suppress(FileExistsError):
                self.fs.mkdir(path)

    def path(self, name: str) -> Path:
        """Returns where the content with this stored digest is."""
        return self.objects / name[:2] / name

    # Writing

    def stage(self, source: bytes | Path) -> Staged:
        """Writes a content to a temporary file and makes its bytes durable.

        Raises:
            OSError: The source cannot be read or the file system refused; nothing is left.
        """
        temp = self.temporary / f"{os.getpid()}-{secrets.token_hex(8)}"
        handle = self.fs.create(temp)
        try:
            try:
                staged = self._fill(handle, temp, source)
                self.sync(handle)
            finally:
                self.fs.close(handle)
        except BaseException:
            self.discard(temp)
            raise
        return staged

    def _fill(self, handle: int, temp: Path, source: bytes | Path) -> Staged:
        if self.sealer is not None:
            return self._fill_sealed(self.sealer, handle, temp, source)
        with ThreadedDigest() as hashing:
            for chunk in chunks(source):
                hashing.update(chunk)
                write_all(self.fs, handle, memoryview(chunk))
            digest = hashing.finish()
        plain = digest.hexdigest
        return Staged(temp, plain, digest.size, digest.prefixes, plain, digest.size, 0)

    def _fill_sealed(self, sealer: Sealer, handle: int, temp: Path, source: bytes | Path) -> Staged:
        target = _Target(self.fs, handle, sealer.head_bytes)
        with contextlib.closing(_Source(chunks(source))) as raw:
            sealer.seal(
                cast(BinaryIO, io.BufferedReader(raw, CHUNK_BYTES)),
                cast(BinaryIO, target),
                context=CONTEXT,
            )
        plain = raw.digest
        name = target.hash.hexdigest()
        return Staged(
            temp, plain.hexdigest, plain.size, plain.prefixes, name, target.size, sealer.head_bytes
        )

    def sync(self, handle: int) -> None:
        """Makes a temporary file durable before it takes its name."""
        self.fs.fsync(handle)

    def discard(self, temp: Path) -> None:
        """Removes a temporary file, as far as that is possible."""
        with contextlib.suppress(OSError):
            self.fs.unlink(temp)

    def publish(self, staged: Sequence[Staged]) -> None:
        """Gives staged contents their names and makes the names durable.

        The caller holds the exclusive lock. A content that is there already keeps its file.

        Raises:
            OSError: The file system refused; names that were given stay, whole, as orphans.
            StateError: A staged content is gone.
        """
        touched: dict[Path, None] = {}
        for item in staged:
            target = self.path(item.name)
            self._make_directory(target.parent)
            if self.fs.exists(target) and self.stored_digest(item.name, item.head) == item.name:
                self.adopt(target)
                self.discard(item.temp)
            else:
                self.quarantine(item.name)
                self._name(item.temp, target)
            touched[target.parent] = None
        for directory in touched:
            self.sync_names(directory)

    def _name(self, temp: Path, target: Path) -> None:
        try:
            self.fs.rename(temp, target)
        except FileNotFoundError as error:
            if self.fs.exists(temp) or not self.fs.exists(target.parent):
                raise
            raise StateError(
                f"Nothing was committed: a collection with too short a grace removed {temp} before "
                "the commit had it. Repeat the commit, and collect with a grace that is longer "
                "than commits take."
            ) from error

    def adopt(self, path: Path) -> None:
        """Makes a file durable that a writer left that was killed before its commit."""
        handle = self.fs.open(path)
        try:
            self.fs.fsync(handle)
        finally:
            self.fs.close(handle)

    def sync_names(self, directory: Path) -> None:
        """Makes the names in a directory durable; a rename alone is lost by a power cut."""
        self.fs.fsync_dir(directory)

    def _make_directory(self, path: Path) -> None:
        if path in self._durable_directories:
            return
        with contextlib.suppress(FileExistsError):
            self.fs.mkdir(path)
        # Also when it was there: whoever made it may have been killed before this.
        self.sync_names(path.parent)
        self._durable_directories.add(path)

    # Reading

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """Yields the bytes of a file as they lie on disk.

        Raises:
            OSError: There is no such file, or it cannot be read.
        """
        handle = self.fs.open(self.path(name))
        try:
            yield cast(BinaryIO, io.BufferedReader(_FromHandle(self.fs, handle), CHUNK_BYTES))
        finally:
            self.fs.close(handle)

    def stored_size(self, name: str) -> int | None:
        """Returns the length of a file in bytes, None when there is none."""
        try:
            return self.fs.size(self.path(name))
        except FileNotFoundError:
            return None

    def stored_digest(
        self, name: str, head: int = 0, after_each: Callable[[], object] = int
    ) -> str:
        """Returns the SHA-256 of a file after its head; equal to its name unless it is damaged.

        Args:
            name: Of the file.
            head: Bytes at its start that are left out.
            after_each: Called after each chunk.
        """
        digest = StreamDigest()
        with self.reading(name) as stream:
            stream.read(head)
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                after_each()
        return digest.hexdigest

    def names(self) -> Iterator[str]:
        """Yields the name of every file of a content, needed or not."""
        return (path.name for path in self._entries() if self._is_of_content(path))

    def foreign(self) -> Iterator[Path]:
        """Yields what lies below objects/ and no store ever put there."""
        return (path for path in self._entries() if not self._is_of_content(path))

    def _entries(self) -> Iterator[Path]:
        for name in self.fs.names(self.objects):
            try:
                below = self.fs.names(self.objects / name)
            except NotADirectoryError:
                yield self.objects / name
            else:
                yield from (self.objects / name / each for each in below)

    def _is_of_content(self, path: Path) -> bool:
        return bool(_NAME.fullmatch(path.name)) and path == self.path(path.name)

    # Setting aside

    def quarantine(self, name: str) -> Path | None:
        """Moves a damaged file out of the way, never deleting it; None when that is impossible."""
        attempt = 0
        while True:
            target = self.quarantined / (f"{name}.{attempt}" if attempt else name)
            try:
                self.fs.rename(self.path(name), target)
                return target
            except FileExistsError:
                attempt += 1
            except OSError:  # There is none, the disk is read-only, or another reader was first.
                return None

    def quarantine_bytes(self, name: str, content: bytes) -> Path | None:
        """Keeps a copy of a damaged content that has no file of its own."""
        target = self.quarantined / name
        try:
            handle = self.fs.create(target)
            try:
                write_all(self.fs, handle, memoryview(content))
            finally:
                self.fs.close(handle)
        except FileExistsError:  # An earlier reader kept it.
            return target
        except OSError:
            return None
        return target


def chunks(source: bytes | Path) -> Iterator[memoryview | bytes]:
    """Yields a content 4 MiB at a time."""
    if isinstance(source, Path):
        with source.open("rb", buffering=0) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
        return
    view = memoryview(source)
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


class _Source(io.RawIOBase):
    """Hands out a content and hashes what it hands out."""

    def __init__(self, parts: Iterator[memoryview | bytes]) -> None:
        self._parts = parts
        self._rest = memoryview(b"")
        self.digest = StreamDigest()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        if not self._rest:
            self._rest = memoryview(next(self._parts, b""))
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self.digest.update(self._rest[:count])
        self._rest = self._rest[count:]
        return count


class _Target:
    """Writes to an open file and hashes what it writes after the head."""

    def __init__(self, fs: Fs, handle: int, head: int) -> None:
        self._fs, self._handle, self._head = fs, handle, head
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self.hash.update(view[max(0, self._head - self.size) :])
        write_all(self._fs, self._handle, view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        pass


class _FromHandle(io.RawIOBase):
    def __init__(self, fs: Fs, handle: int) -> None:
        self._fs, self._handle = fs, handle

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        data = self._fs.read(self._handle, len(view))
        view[: len(data)] = data
        return len(data)
