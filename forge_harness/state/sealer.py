"""What the store asks of encryption: streams and short strings, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Protocol


class Sealer(Protocol):
    """Encrypts with authentication; `forge_harness.security.sealing` has the real one.

    `context` is bound: what was sealed under one context does not open under another.
    """

    @property
    def head_bytes(self) -> int:
        """Bytes at the start of what is sealed that a change of key rewrites; the rest stays."""

    def check_head(self, data: bytes) -> None:
        """Raises WrongKeyError when the sealer never had a key of what begins like this."""

    def seal(self, source: BinaryIO, target: BinaryIO, *, context: bytes = b"") -> None:
        """Reads `source` to its end and writes the sealed form to `target`."""

    def unseal(self, source: BinaryIO, target: BinaryIO, *, context: bytes = b"") -> None:
        """Writes the plaintext; it may be used only when the call returned."""

    def seal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """Returns the sealed form of a short string."""

    def unseal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """Returns what was sealed."""

    def rewrap_file(self, path: Path) -> bool:
        """Puts a sealed file under the newest key in place; whether anything had to change."""

    def rewrap_bytes(self, data: bytes) -> bytes | None:
        """Returns a sealed string under the newest key; None when it is already."""
