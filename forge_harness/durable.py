"""Files and directories that are whole or absent, and that survive a power cut once written."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

from forge_harness.forks import Lockable

_OPEN_FILES = r"/proc/{}(/task/\d+)?/fd"
"""Where Linux has the open files of a process."""
_MOST_LINKS = 40
"""As many as Linux follows."""
_LONGEST_NAME = 255
"""Bytes of a name in a directory, on every file system in use."""
_CHUNK_BYTES = 1 << 20
_PARTIAL = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.partial")


def write_durably(path: Path, content: bytes) -> None:
    """Replaces a file: a reader sees the old or the new content, and the new one is on disk.

    What is no plain file is written to instead, as `staged_file` says.

    Args:
        path: Target; its directory is created when it is not there.
        content: The whole file.

    Raises:
        OSError: The file system refused; the old file is untouched.
    """
    try:
        with staged_file(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        # What a write or a sync raises names no file.
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; what was written there becomes `path` when the block ends well.

    The file is flushed to disk before it takes its name, and the name after it. When the block
    raises, nothing of it is left and an old `path` is untouched.

    A device, a pipe or the name of an open file (/dev/stdout) stays what it is: what was written
    goes through it when the block ends well.

    Raises:
        OSError: The file system refused.
    """
    if is_written_through(path):
        with tempfile.TemporaryDirectory(prefix="forge-") as scratch:
            yield (partial := Path(scratch) / "partial")
            _write_through(partial, path)
        return
    _make_parent(path)
    partial = _beside(path, "partial")
    try:
        yield partial
        sync_file(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def staged_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty directory to fill; it becomes `path` when the block ends well.

    Every file in it and every name is on disk before it takes its name. When the block raises,
    nothing of it is left and an old `path` is untouched.

    Args:
        path: Target. Missing or an empty directory, unless `replace`.
        replace: Whether an existing directory may give way. It does so in two renames; a power cut
            between them leaves the old content beside the target as
            `.<name>.<pid>-<random>.old`.

    Raises:
        FileExistsError: `path` is there and not an empty directory, and `replace` is not set or
            it is a device, a pipe or the name of an open file.
        OSError: The file system refused.
    """
    if is_written_through(path):
        raise FileExistsError(f"{str(path)!r} is no directory and stays what it is")
    if not replace and (path.is_symlink() or path.exists()) and not _is_empty_directory(path):
        raise FileExistsError(f"{str(path)!r} exists and is not an empty directory")
    _make_parent(path)
    stage = _beside(path, "partial")
    stage.mkdir()
    try:
        yield stage
        sync_tree(stage)
        _take_name(stage, path, replace=replace)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    sync_directory(path.parent)


def read_plain(path: Path) -> bytes:
    """Returns the content of a plain file.

    Raises:
        OSError: As `opened_plain`.
    """
    with opened_plain(path) as stream:
        return stream.read()


@contextmanager
def opened_plain(path: Path) -> Iterator[BinaryIO]:
    """Opens a plain file for reading: a pipe is never waited for, a device never read.

    Raises:
        OSError: It cannot be read, or is something else.
    """
    # Without O_NONBLOCK opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            # Python would name it by its number, and leave it open.
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a plain file", str(path))
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            yield stream
    finally:
        os.close(descriptor)


def identity_of(path: Path) -> tuple[int, int] | None:
    """Returns what tells a file from another that takes its name; None when nothing has it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keeps others that ask for it from a file until the block ends; waits for whoever has it.

    The lock is on `<name>.lock` beside it, as the file itself is replaced when it is written.

    Raises:
        OSError: The file system refused.
    """
    import fcntl  # Windows has none.

    _make_parent(path)
    beside = _named(path).with_name(f"{path.name}.lock")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    with closing(Lockable(os.open(beside, flags, 0o666))) as lock:
        fcntl.flock(lock.descriptor, fcntl.LOCK_EX)
        yield


def is_written_through(path: Path) -> bool:
    """Returns whether writing leaves in place what is there: no plain file can stand for it.

    As root, a rename would take /dev/null or /dev/stdout from the whole machine.
    """
    if _own_descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:  # Nothing, or what writing will complain of.
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def remove_partials(path: Path) -> None:
    """Removes from a directory what writes that were killed have left in it.

    Only for who alone writes there: what another is writing is no different.

    Raises:
        OSError: The file system refused.
    """
    for entry in path.iterdir() if path.is_dir() else ():
        if not _PARTIAL.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def sync_tree(path: Path) -> None:
    """Makes every file and name below a directory durable."""
    for root, _, files in os.walk(path):
        for name in files:
            sync_file(Path(root) / name)
        sync_directory(Path(root))


def sync_file(path: Path) -> None:
    """Makes the content of a file durable."""
    _sync(path)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable; a rename alone is lost by a power cut."""
    if os.name != "nt":  # Directories cannot be opened there.
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_descriptor(path: Path) -> int | None:
    """The open file that /dev/stdout, /dev/fd/1 or a link to such names; None for anything else."""
    at = path.absolute()
    for _ in range(_MOST_LINKS):
        directory = os.path.realpath(at.parent)
        if at.name.isdecimal() and re.fullmatch(_OPEN_FILES.format(os.getpid()), directory):
            return int(at.name)
        if not at.is_symlink():
            return None
        at = at.parent / at.readlink()
    return None


def _write_through(source: Path, path: Path) -> None:
    own = _own_descriptor(path)
    try:
        # Opened by its name, an open file would be written to from its start.
        target = os.open(path, os.O_WRONLY | os.O_CLOEXEC) if own is None else os.dup(own)
        try:
            with source.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    view = memoryview(chunk)
                    while view:
                        view = view[os.write(target, view) :]
            if stat.S_ISREG(os.fstat(target).st_mode):
                os.fsync(target)
        finally:
            os.close(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


def _beside(path: Path, what: str) -> Path:
    """A name of this call's own: two threads of one process may write one file."""
    end = f".{os.getpid()}-{secrets.token_hex(4)}.{what}"
    # No longer than a name may be: the one that was asked for may be as long as that.
    start = f".{path.name}".encode("utf-8", "surrogateescape")[: _LONGEST_NAME - len(end)]
    return _named(path).with_name(start.decode("utf-8", "ignore") + end)


def _named(path: Path) -> Path:
    """Refuses `.` and `/`, which have no name that another could stand beside."""
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return path


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(
            errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)
        ) from error


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and next(path.iterdir(), None) is None


def _take_name(stage: Path, path: Path, *, replace: bool) -> None:
    if not replace or not path.exists() or _is_empty_directory(path):
        # rename(2) replaces an empty directory, and refuses one that was filled meanwhile.
        stage.replace(path)
        return
    old = _beside(path, "old")
    path.replace(old)
    try:
        stage.replace(path)
    except BaseException:
        old.replace(path)
        raise
    if old.is_symlink() or not old.is_dir():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)
