"""Signed heads of an audit log, kept outside of it: what the log was at a moment.

A chain shows that a record was changed, not that the whole file was put back to an earlier state.
A head (log id, number, MAC, signature) can: the log must still have that record. Heads are lines of
a file; each names the digest of the line before. Whoever can write both files can take both back
together, so copy the newest head to another machine and give it to `verify`.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from forge_harness.canonical import canonical_json, sha256_hex
from forge_harness.durable import read_plain, sync_directory
from forge_harness.errors import AuditError, UsageError
from forge_harness.forks import Lockable

_FIRST = "0" * 64
_TAIL_BYTES = 4096
"""A head takes about 330 bytes."""


@dataclass(frozen=True, slots=True)
class Head:
    """One signed head.

    Attributes:
        log_id: Of the log.
        number: Of the newest record then; 0 for an empty log.
        mac: Of that record, hexadecimal.
        time: UTC, ISO 8601.
        previous: SHA-256 of the line before in the file of heads.
        signature: Ed25519 over the rest, base64.
    """

    log_id: str
    number: int
    mac: str
    time: str
    previous: str
    signature: str

    def signed(self) -> bytes:
        """Returns the bytes the signature is over."""
        return b"forge-audit-head/1\n" + canonical_json(
            {
                "log_id": self.log_id,
                "number": self.number,
                "mac": self.mac,
                "time": self.time,
                "previous": self.previous,
            }
        )

    def line(self) -> bytes:
        """Returns the head as a line of the file."""
        return canonical_json(
            {
                "log_id": self.log_id,
                "number": self.number,
                "mac": self.mac,
                "time": self.time,
                "previous": self.previous,
                "signature": self.signature,
            }
        )


def parse_head(line: bytes) -> Head:
    """Reads one line.

    Raises:
        AuditError: It is no head.
    """
    try:
        entry = json.loads(line)
        head = Head(**entry)
        if not isinstance(head.number, int) or not isinstance(head.signature, str):
            raise TypeError("wrong types")
        return head
    except (TypeError, ValueError, RecursionError) as error:
        raise AuditError(f"A line is no signed head of an audit log ({error}).") from error


def is_signed_by(head: Head, keys: Iterable[Ed25519PublicKey]) -> bool:
    """Whether one of the keys signed the head."""
    for key in keys:
        try:
            key.verify(base64.b64decode(head.signature, validate=True), head.signed())
        except (InvalidSignature, binascii.Error, ValueError):
            continue
        return True
    return False


class HeadFile:
    """The file of heads.

    Args:
        path: Made with the first head.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[bytes]:
        """Returns the lines that are whole; a torn last one was never acknowledged.

        Raises:
            UsageError: The file cannot be read, or is no plain file.
        """
        try:
            content = read_plain(self.path)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UsageError(
                f"The heads {str(self.path)!r} cannot be read ({error.strerror}); expected the "
                "file of heads of the log, that can be opened."
            ) from error
        return content.split(b"\n")[:-1]

    def add(self, log_id: str, number: int, mac: bytes, key: Ed25519PrivateKey) -> Head:
        """Signs and appends a head; returns once it is on disk.

        Of several writers the one that added a record first may come here last: where a newer head
        is there already, which vouches for its record too, that one is returned.

        Raises:
            AuditError: The file system refused.
        """
        try:
            with self._locked() as descriptor:
                last, end = _last_line(descriptor)
                newest = _head_of(last, log_id)
                if newest is not None and newest.number > number:
                    return newest
                head = _sign(log_id, number, mac, sha256_hex(last) if last else _FIRST, key)
                _write_line(descriptor, head.line(), end)
        except OSError as error:
            raise AuditError(
                f"The head of the audit log cannot be kept in {str(self.path)!r} ({error}); free "
                "space or mend the path."
            ) from error
        return head

    @contextmanager
    def _locked(self) -> Iterator[int]:
        made = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with closing(Lockable(descriptor)):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        if made:
            sync_directory(self.path.parent)


def _last_line(descriptor: int) -> tuple[bytes, int]:
    """Returns the last whole line and where it ends; the file is not read as a whole."""
    size = os.fstat(descriptor).st_size
    taken = _TAIL_BYTES
    while True:
        start = max(0, size - taken)
        content = os.pread(descriptor, size - start, start)
        end = content.rfind(b"\n") + 1
        begin = content.rfind(b"\n", 0, end - 1) + 1 if end else 0
        if start == 0 or begin > 0:
            return content[begin : max(0, end - 1)], start + end
        taken *= 2


def _head_of(line: bytes, log_id: str) -> Head | None:
    """Returns the head a line is, None when it is none of this log: `verify` says so."""
    try:
        head = parse_head(line)
    except AuditError:
        return None
    return head if head.log_id == log_id else None


def _write_line(descriptor: int, line: bytes, length: int) -> None:
    os.ftruncate(descriptor, length)  # a line torn by a kill goes
    view = memoryview(line + b"\n")
    while view:
        written = os.pwrite(descriptor, view, length)
        view, length = view[written:], length + written
    os.fsync(descriptor)


def _sign(log_id: str, number: int, mac: bytes, previous: str, key: Ed25519PrivateKey) -> Head:
    time = datetime.now(UTC).isoformat(timespec="microseconds")
    unsigned = Head(log_id, number, mac.hex(), time, previous, "")
    signature = base64.b64encode(key.sign(unsigned.signed())).decode()
    return Head(log_id, number, mac.hex(), time, previous, signature)
