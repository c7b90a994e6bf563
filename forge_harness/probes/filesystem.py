"""What a run needs of a file system: space, atomic rename, fsync, locks, text in UTF-8."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from forge_harness.paths import resolved_path

NETWORK_TYPES = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre"}
    | {"beegfs", "gpfs", "orangefs", "pvfs2", "davfs", "ocfs2", "gfs2", "wekafs", "panfs"}
)
"""Types on which rename or locks are not atomic between machines, or fsync may lie."""
LOCAL_FUSE_TYPES = frozenset({"fuse.overlayfs", "fuse.fuse-overlayfs", "fuse.ntfs-3g"})
"""User-space file systems on local disks; others (sshfs, s3fs, gcsfuse, rclone) are not."""


_ESCAPED = re.compile(r"\\([0-7]{3})")
"""How the kernel writes blanks, tabs, line ends and backslashes of a path."""


def is_network(kind: str) -> bool:
    """Returns whether a file system type is kept on other machines, as far as its name says."""
    return kind in NETWORK_TYPES or (kind.startswith("fuse.") and kind not in LOCAL_FUSE_TYPES)


@dataclass(frozen=True, slots=True)
class DurabilityReading:
    """Which operations worked in a directory; the first error of those that did not."""

    fsync_file: bool
    rename_replaces: bool
    """A rename over an existing file left exactly the new content under the name."""
    fsync_directory: bool
    lock_excludes: bool
    """A second exclusive lock on the same file was refused."""
    error: str


def file_system_type(path: Path, mounts: str | None = None) -> str:
    """Returns the type of the file system `path` is on, or "unknown" where it cannot be told.

    Args:
        path: Existing path.
        mounts: Text in the form of /proc/self/mounts; read when None.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "unknown"
    target, best, kind = resolved_path(path), "", "unknown"
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), fields[1])
        # The last mount on a point is the one in force.
        if target.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def probe_durability(directory: Path) -> DurabilityReading:
    """Tries fsync, rename, directory fsync and locks in `directory`, and cleans up."""
    done = dict.fromkeys(
        ("fsync_file", "rename_replaces", "fsync_directory", "lock_excludes"), False
    )
    error = ""
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=directory) as name:
        try:
            _write_synced(Path(name) / "new", b"new")
            done["fsync_file"] = True
            (Path(name) / "old").write_bytes(b"old")
            os.replace(Path(name) / "new", Path(name) / "old")
            done["rename_replaces"] = os.listdir(name) == ["old"] and (
                (Path(name) / "old").read_bytes() == b"new"
            )
            _sync_directory(Path(name))
            done["fsync_directory"] = True
            done["lock_excludes"] = _lock_excludes(Path(name) / "old")
        except OSError as problem:
            error = f"{type(problem).__name__}: {problem.strerror}"
    return DurabilityReading(**done, error=error)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock_excludes(path: Path) -> bool:
    import fcntl

    with path.open("rb") as first, path.open("rb") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def free_bytes(path: Path) -> int:
    """Returns the bytes an unprivileged process can still write on the file system of `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def unwritable(directories: list[Path]) -> list[tuple[Path, str]]:
    """Returns the directories (or their nearest existing parents) nothing can be created in."""
    refused = []
    for directory in directories:
        existing = directory
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        try:
            # os.access answers for the permission bits; a read-only mount or root needs a try.
            with tempfile.NamedTemporaryFile(prefix=".probe-", dir=existing):
                pass
        except OSError as error:
            refused.append((directory, error.strerror or type(error).__name__))
    return refused


def text_round_trip(directory: Path, text: str) -> str:
    """Writes text and reads it back with the interpreter's default encoding, name included."""
    path = directory / f"probe-{text}.txt"
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: path.unlink(missing_ok=True))
        # No encoding given on purpose: the default is what is probed.
        with open(path, "w") as stream:
            stream.write(text)
        return path.read_bytes().decode("utf-8", errors="replace")
