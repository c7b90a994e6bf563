r"""The head of a sealed file: which key wraps its data key. Rotation rewrites this, not the file.

    "FHSEAL1\n" | slot | slot | stream of `segments`

A slot is the id of a key-encryption key (8 bytes) and the data key wrapped by it (AES-KW, RFC 3394:
40 bytes, self-checking), or zeros. There are two, so that a new wrapping is on disk before the old
one goes: a reader finds a good slot at every moment, and so does the next start after a power cut.
The slots are not bound to the stream; the format's name and the caller's context are.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from forge_harness.errors import DamagedSealError, WrongKeyError

from .keys import Keyring
from .segments import KEY_BYTES

MAGIC = b"FHSEAL1\n"
_ID_BYTES, _WRAPPED_BYTES = 8, 40
SLOT_BYTES = _ID_BYTES + _WRAPPED_BYTES
HEAD_BYTES = len(MAGIC) + 2 * SLOT_BYTES
_FREE = bytes(SLOT_BYTES)


@dataclass(frozen=True, slots=True)
class Head:
    """The two slots of a sealed file."""

    slots: tuple[bytes, bytes]

    @classmethod
    def parse(cls, data: bytes) -> Head:
        """Reads the first `HEAD_BYTES` of a sealed file.

        Raises:
            DamagedSealError: It is not sealed, or cut off.
        """
        if len(data) < HEAD_BYTES or not data.startswith(MAGIC):
            raise DamagedSealError(
                f"The content is not sealed: it starts with {data[:8]!r} ({len(data)} bytes read), "
                f"{MAGIC!r} was expected."
            )
        middle = len(MAGIC) + SLOT_BYTES
        return cls((data[len(MAGIC) : middle], data[middle:HEAD_BYTES]))

    def encode(self) -> bytes:
        """Returns the bytes of the head."""
        return MAGIC + self.slots[0] + self.slots[1]

    def key_ids(self) -> tuple[str, ...]:
        """Returns the ids of the keys that open the file."""
        return tuple(slot[:_ID_BYTES].hex() for slot in self.slots if slot != _FREE)


def new_head(keyring: Keyring) -> tuple[Head, bytes]:
    """Returns a head with a fresh data key wrapped by the active key, and the data key."""
    data_key = os.urandom(KEY_BYTES)
    return Head((_wrapped(keyring, data_key), _FREE)), data_key


def data_key_of(head: Head, keyring: Keyring) -> bytes:
    """Returns the data key.

    Raises:
        WrongKeyError: No key of the keyring wraps it; says which would.
        DamagedSealError: The wrapping is damaged.
    """
    damaged = False
    for slot in head.slots:
        key = keyring.usable(slot[:_ID_BYTES].hex())
        if slot == _FREE or key is None:
            continue
        try:
            return aes_key_unwrap(key, slot[_ID_BYTES:])
        except InvalidUnwrap:
            damaged = True
    if damaged:
        raise DamagedSealError(
            "The wrapped key in the head of the sealed content is damaged; restore it from a copy."
        )
    raise WrongKeyError(
        f"The content is sealed under key {' or '.join(head.key_ids()) or 'none'}, and the keyring "
        f"has {', '.join(keyring.usable_ids()) or 'none'}; open it with the keyring it was sealed "
        "with."
    )


def rewrapped(head: Head, keyring: Keyring) -> tuple[Head, Head] | None:
    """Returns the head with both wrappings and with the active one alone; None: nothing to do.

    Raises:
        WrongKeyError: As for `data_key_of`.
        DamagedSealError: As for `data_key_of`.
    """
    data_key = data_key_of(head, keyring)
    if head.key_ids() == (keyring.active_id(),):
        return None
    fresh = 1 - _opening_slot(head, keyring)
    both, alone = list(head.slots), [_FREE, _FREE]
    both[fresh] = alone[fresh] = _wrapped(keyring, data_key)
    return Head((both[0], both[1])), Head((alone[0], alone[1]))


def rewrap_file(path: Path, keyring: Keyring) -> bool:
    """Puts a sealed file under the active key in place: 96 bytes change, whatever its size.

    Readers may read it meanwhile. Killed at any moment, it opens with the old key, the new one, or
    both, and a repetition completes it.

    Returns:
        Whether anything had to change.

    Raises:
        WrongKeyError: No key of the keyring opens it.
        DamagedSealError: It is not sealed, or its head is damaged.
        OSError: The file system refused; the file still opens.
    """
    with path.open("rb") as stream:
        heads = rewrapped(read_head(stream), keyring)
    if heads is None:
        return False
    with _writable(path) as descriptor:
        for head in heads:
            _write_at(descriptor, head.encode(), 0)
            os.fsync(descriptor)
    return True


def read_head(source: BinaryIO) -> Head:
    """Reads the head where a stream stands.

    Raises:
        DamagedSealError: It is not sealed, or cut off.
    """
    data = b""
    while len(data) < HEAD_BYTES and (more := source.read(HEAD_BYTES - len(data))):
        data += more
    return Head.parse(data)


def _wrapped(keyring: Keyring, data_key: bytes) -> bytes:
    return bytes.fromhex(keyring.active_id()) + aes_key_wrap(keyring.active(), data_key)


def _opening_slot(head: Head, keyring: Keyring) -> int:
    """The slot that opens; of two, the one that is not the active key's."""
    good = [i for i in (0, 1) if _opens(Head((head.slots[i], _FREE)), keyring)]
    old = [i for i in good if head.slots[i][:_ID_BYTES].hex() != keyring.active_id()]
    return (old or good)[0]


def _opens(head: Head, keyring: Keyring) -> bool:
    try:
        data_key_of(head, keyring)
    except (WrongKeyError, DamagedSealError):
        return False
    return True


@contextmanager
def _writable(path: Path) -> Iterator[int]:
    """Opens a file to change it in place; one that is read-only is so again afterwards."""
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode | stat.S_IWUSR)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    finally:
        path.chmod(mode)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
