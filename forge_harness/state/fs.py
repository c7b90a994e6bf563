"""The few file operations the store makes, behind one seam: real here, simulated in tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

_T = TypeVar("_T")


class Fs(Protocol):
    """What the store asks of a file system. Every method raises OSError when it refuses.

    Handles are small integers that mean something to the implementation only.
    """

    def create(self, path: Path) -> int:
        """Opens a new file for writing; FileExistsError when the name is taken."""

    def write(self, handle: int, data: memoryview) -> int:
        """Writes at the end of the file and returns how many bytes were taken, maybe fewer."""

    def fsync(self, handle: int) -> None:
        """Makes the content of an open file durable; a failure must never be retried."""

    def close(self, handle: int) -> None:
        """Gives the handle back."""

    def open(self, path: Path) -> int:
        """Opens an existing file for reading."""

    def read(self, handle: int, size: int) -> bytes:
        """Reads up to `size` bytes from where the last read ended; empty at the end."""

    def size(self, path: Path) -> int:
        """Returns the length of a file in bytes; FileNotFoundError when there is none."""

    def modified_at(self, path: Path) -> float:
        """Returns when a file was last written, in seconds since the epoch."""

    def exists(self, path: Path) -> bool:
        """Returns whether anything has this name."""

    def names(self, path: Path) -> list[str]:
        """Returns the names in a directory, sorted; none when there is no such directory."""

    def rename(self, source: Path, target: Path) -> None:
        """Moves a file to a free name; FileExistsError when the name is taken."""

    def unlink(self, path: Path) -> None:
        """Removes a name."""

    def mkdir(self, path: Path) -> None:
        """Makes a directory; FileExistsError when the name is taken."""

    def fsync_dir(self, path: Path) -> None:
        """Makes the names in a directory durable."""


class RealFs:
    """The operating system's file system."""

    def create(self, path: Path) -> int:
        """See `Fs`."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, handle: int, data: memoryview) -> int:
        """See `Fs`."""
        return os.write(handle, data)

    def fsync(self, handle: int) -> None:
        """See `Fs`."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        """See `Fs`."""
        os.close(handle)

    def open(self, path: Path) -> int:
        """See `Fs`."""
        # A pipe in place of a content is damage, and would be waited for.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def read(self, handle: int, size: int) -> bytes:
        """See `Fs`."""
        return os.read(handle, size)

    def size(self, path: Path) -> int:
        """See `Fs`."""
        return path.stat().st_size

    def modified_at(self, path: Path) -> float:
        """See `Fs`."""
        return path.stat().st_mtime

    def exists(self, path: Path) -> bool:
        """See `Fs`."""
        return os.path.lexists(path)

    def names(self, path: Path) -> list[str]:
        """See `Fs`."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def rename(self, source: Path, target: Path) -> None:
        """See `Fs`. Two writers cannot both see a free name: the caller holds the store's lock."""
        if os.path.lexists(target):
            raise FileExistsError(17, "File exists", str(target))
        _uninterrupted(lambda: os.rename(source, target))

    def unlink(self, path: Path) -> None:
        """See `Fs`."""
        _uninterrupted(lambda: os.unlink(path))

    def mkdir(self, path: Path) -> None:
        """See `Fs`."""
        _uninterrupted(lambda: os.mkdir(path))

    def fsync_dir(self, path: Path) -> None:
        """See `Fs`."""
        if os.name == "nt":  # Directories cannot be opened there.
            return
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_all(fs: Fs, handle: int, data: memoryview) -> None:
    """Writes everything, however little each call takes."""
    while data:
        data = data[fs.write(handle, data) :]


def _uninterrupted(call: Callable[[], _T]) -> _T:
    # The interpreter retries EINTR of open, read, write and fsync (PEP 475), not of these.
    while True:
        try:
            return call()
        except InterruptedError:
            continue
