"""Sealed content: AES-256-GCM under a data key of its own, wrapped by the keyring's active key."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from forge_harness.durable import staged_file
from forge_harness.errors import DamagedSealError

from . import envelope, segments
from .keys import Keyring, Purpose

HEAD_BYTES = envelope.HEAD_BYTES


class KeyringSealer:
    """Seals and unseals streams, short strings and files.

    Args:
        keyring: Its active key wraps, any of its keys unwraps. A function is asked each time, so
            that a rotation reaches an open store.
    """

    def __init__(self, keyring: Keyring | Callable[[], Keyring]) -> None:
        self._keyring = keyring if callable(keyring) else lambda: keyring

    @property
    def head_bytes(self) -> int:
        """Bytes at the start that `rewrap_file` may rewrite; the rest never changes."""
        return HEAD_BYTES

    def seal(self, source: BinaryIO, target: BinaryIO, *, context: bytes = b"") -> None:
        """Seals a stream to its end.

        Args:
            source: The plaintext.
            target: Gets the sealed content.
            context: Bound; needed again to unseal.

        Raises:
            MissingKeyError: The keyring has no active key.
            OSError: A stream refused.
        """
        head, data_key = envelope.new_head(self._keyring())
        segments.write_all(target, head.encode())
        segments.encrypt(source, target, key=data_key, info=_info(context))

    def unseal(self, source: BinaryIO, target: BinaryIO, *, context: bytes = b"") -> None:
        """Writes the plaintext; it may be used only when this has returned.

        Raises:
            WrongKeyError: The keyring has no key for it.
            DamagedSealError: It was changed, cut off, or sealed under another context.
            OSError: A stream refused.
        """
        head = envelope.read_head(source)
        data_key = envelope.data_key_of(head, self._keyring())
        segments.decrypt(source, target, key=data_key, info=_info(context))

    def seal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """Returns the sealed form of a short string."""
        target = io.BytesIO()
        self.seal(io.BytesIO(data), target, context=context)
        return target.getvalue()

    def unseal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """Returns what was sealed.

        Raises:
            WrongKeyError: As for `unseal`.
            DamagedSealError: As for `unseal`.
        """
        target = io.BytesIO()
        self.unseal(io.BytesIO(data), target, context=context)
        return target.getvalue()

    def seal_file(self, source: Path, target: Path, *, context: bytes = b"") -> None:
        """Seals a file; `target` appears whole and durable, or not at all.

        Raises:
            MissingKeyError: The keyring has no active key.
            OSError: The file system refused.
        """
        with source.open("rb") as plain, staged_file(target) as stage, stage.open("wb") as sealed:
            self.seal(plain, sealed, context=context)

    def unseal_file(self, source: Path, target: Path, *, context: bytes = b"") -> None:
        """Unseals a file; `target` appears only when all of it has been verified.

        Raises:
            WrongKeyError: As for `unseal`.
            DamagedSealError: As for `unseal`.
            OSError: The file system refused.
        """
        with source.open("rb") as sealed, staged_file(target) as stage, stage.open("wb") as plain:
            stage.chmod(0o600)
            self.unseal(sealed, plain, context=context)

    def check_head(self, data: bytes) -> None:
        """Refuses what was sealed under keys of another keyring.

        Args:
            data: The first `head_bytes` of it.

        Raises:
            WrongKeyError: The keyring has none of its keys, and never had one that is destroyed.
        """
        try:
            head = envelope.Head.parse(data)
        except DamagedSealError:  # Says nothing about the keys.
            return
        keyring = self._keyring()
        known = {key.id for key in keyring.keys if key.purpose is Purpose.SEAL}
        if known.isdisjoint(head.key_ids()):
            envelope.data_key_of(head, keyring)

    def rewrap_file(self, path: Path) -> bool:
        """Puts a sealed file under the active key in place (see `envelope.rewrap_file`)."""
        return envelope.rewrap_file(path, self._keyring())

    def segment_starts(self, length: int) -> tuple[int, ...]:
        """Returns the offsets at which the segments of `length` sealed bytes start."""
        later = range(HEAD_BYTES + segments.SEGMENT_BYTES, length, segments.SEGMENT_BYTES)
        return (HEAD_BYTES + segments.HEADER_BYTES, *later)

    def is_sealed(self, path: Path) -> bool:
        """Whether a file says that it is sealed; what it holds is not looked at."""
        with path.open("rb") as stream:
            return stream.read(len(envelope.MAGIC)) == envelope.MAGIC

    def rewrap_bytes(self, data: bytes) -> bytes | None:
        """Returns a sealed string under the active key alone, or None when it is already.

        Raises:
            WrongKeyError: As for `unseal`.
            DamagedSealError: As for `unseal`.
        """
        heads = envelope.rewrapped(envelope.Head.parse(data[:HEAD_BYTES]), self._keyring())
        return None if heads is None else heads[1].encode() + data[HEAD_BYTES:]


def key_ids(path: Path) -> tuple[str, ...]:
    """Returns the ids of the keys that open a sealed file.

    Raises:
        DamagedSealError: It is not sealed.
    """
    with path.open("rb") as stream:
        return envelope.read_head(stream).key_ids()


def _info(context: bytes) -> bytes:
    """What the stream is bound to: this format and the caller's context, never the key's id."""
    return envelope.MAGIC + context
