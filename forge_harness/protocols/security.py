"""Encryption, audit log and signatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable


class ContentSealer(Protocol):
    """Encrypts contents with authentication, each bound to a context."""

    @property
    def head_bytes(self) -> int:
        """Bytes at the start of a sealed content that a change of key rewrites."""
        ...

    def seal(self, source: BinaryIO, target: BinaryIO, *, context: bytes = b"") -> None:
        """Reads `source` to its end and writes the sealed form to `target`."""
        ...

    def unseal(self, source: BinaryIO, target: BinaryIO, *, context: bytes = b"") -> None:
        """Writes the plaintext; raises when the sealed form is not what `seal` wrote."""
        ...

    def seal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """The sealed form of a short content."""
        ...

    def unseal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """The content; raises as `unseal` does."""
        ...

    def segment_starts(self, length: int) -> Sequence[int]:
        """Offsets at which the segments of a sealed form of `length` bytes start."""
        ...

    def is_sealed(self, path: Path) -> bool:
        """Whether a file has the form of a sealed content."""
        ...

    def rewrap_file(self, path: Path) -> bool:
        """Puts a sealed file under the newest key in place; whether anything had to change."""
        ...


@runtime_checkable
class SealsContent(Protocol):
    """Encrypts what is kept, under keys that rotate."""

    def content_sealer(self) -> ContentSealer:
        """The sealer; a rotation reaches it without a new one."""
        ...

    def rotate_seal_key(self) -> None:
        """New contents are sealed under a new key; what is sealed already stays readable."""
        ...

    def destroy_old_seal_keys(self) -> None:
        """Forgets every key but the newest; what is still under them can never be read again."""
        ...


class AuditWriter(Protocol):
    """An open audit log."""

    def add(self, actor: str, action: str, resource: str) -> None:
        """Records an action; returns once it is on disk, raises when it cannot be."""
        ...

    def close(self) -> None:
        """Closes the log."""
        ...


@runtime_checkable
class KeepsAuditLog(Protocol):
    """Keeps a log of actions that shows when it was tampered with."""

    def audit_log(self, path: Path) -> AuditWriter:
        """Opens, or makes, the SQLite log at `path`; further files go beside it."""
        ...

    def audit_problems(self, path: Path) -> Sequence[str]:
        """What a verification of the log finds; raises when it cannot be read at all."""
        ...

    def audited(self, path: Path, action: Callable[[], None]) -> None:
        """Does `action` and records it in the log; without a record the action is not done."""
        ...


@runtime_checkable
class SignsPackages(Protocol):
    """Signs export packages, and holds packages against signatures with pinned keys."""

    def sign_package(self, directory: Path) -> Path:
        """Signs every file of a directory; returns the signature, which lies outside of it.

        Its format is the subject's. A second instance, made without arguments, signs with a key of
        its own, which the first does not trust.
        """
        ...

    def check_package(self, directory: Path, signature: Path) -> None:
        """Raises unless the directory is exactly what a pinned key signed."""
        ...
