"""A note of the newest generation beside the index, to tell a lost one from one never committed.

When the write-ahead log is damaged or gone SQLite goes on without what it held, and says nothing. A
commit therefore leaves its number and digest in `head` once it is on disk. The note needs no fsync:
after a power cut it may name an older generation, never one that is not there. What turned out to
be lost is kept in `losses` until somebody removes that file.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from forge_harness.canonical import sha256_hex
from forge_harness.durable import read_plain

HEAD, LOSSES = "head", "losses"
_LINE = re.compile(r"([0-9]{20}) ([0-9a-f]{64}) ([0-9a-f]{16})\n")


@dataclass(frozen=True, slots=True)
class Head:
    """What the note says."""

    number: int
    """Newest generation that was acknowledged; 0 for none."""
    digest: str
    """Of its manifest."""
    is_legible: bool = True


def write_head(root: Path, number: int, digest: str) -> None:
    """Notes a generation that is on disk; a failure only makes the note older than it could be."""
    body = f"{number:020} {digest}"
    line = f"{body} {sha256_hex(body.encode())[:16]}\n".encode()
    with contextlib.suppress(OSError):
        handle = os.open(root / HEAD, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # In place and within one sector: a reader sees the old line or the new one.
            os.pwrite(handle, line, 0)
        finally:
            os.close(handle)


def read_head(root: Path) -> Head:
    """Returns the newest generation that was noted.

    Raises:
        OSError: The note is there and cannot be read.
    """
    try:
        data = read_plain(root / HEAD)
    except FileNotFoundError:
        return Head(0, "")
    if not data.strip(b"\0"):  # A power cut before the first note reached the disk.
        return Head(0, "")
    match = _LINE.fullmatch(data.decode("ascii", errors="replace"))
    if not match or sha256_hex(f"{match[1]} {match[2]}".encode())[:16] != match[3]:
        return Head(0, "", is_legible=False)
    return Head(int(match[1]), match[2])


def add_loss(root: Path, head: Head) -> None:
    """Remembers a generation that was acknowledged and is gone, as far as that is possible."""
    with contextlib.suppress(OSError), (root / LOSSES).open("a", encoding="ascii") as stream:
        stream.write(f"{head.number} {head.digest}\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_losses(root: Path) -> list[str]:
    """Returns one line for each loss that was found and not dealt with.

    Raises:
        OSError: They cannot be read.
    """
    try:
        return read_plain(root / LOSSES).decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
