"""AES-256-GCM over segments: streams of any length, verified segment by segment.

The layout is that of Tink's AES256_GCM_HKDF_1MB streaming AEAD, so that Tink opens what this
writes and the other way round (https://developers.google.com/tink/streaming-aead/
aes_gcm_hkdf_streaming):

    length of the header (1 byte: 40) | salt (32) | nonce prefix (7) | segments

A segment is up to 1 MiB of ciphertext with its 16-byte tag; the first one is shorter by the header.
Its nonce is prefix | number (4 bytes, big endian) | 1 for the last segment and 0 for the others: a
segment that is moved, dropped, repeated or taken from another file does not verify, and neither
does a stream that ends early.
"""

from __future__ import annotations

import os
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from forge_harness.errors import DamagedSealError

SEGMENT_BYTES = 1 << 20
KEY_BYTES = 32
TAG_BYTES = 16
HEADER_BYTES = 40
_SALT_BYTES, _PREFIX_BYTES = 32, 7
_MOST_SEGMENTS = 1 << 32


def encrypt(source: BinaryIO, target: BinaryIO, *, key: bytes, info: bytes) -> None:
    """Encrypts a stream to its end.

    Args:
        source: Read from where it stands.
        target: Gets header and segments.
        key: 32 bytes, for this stream only.
        info: Bound to the stream; needed again to decrypt.

    Raises:
        OSError: A stream refused.
    """
    salt, prefix = os.urandom(_SALT_BYTES), os.urandom(_PREFIX_BYTES)
    cipher = AESGCM(_derived(key, salt, info))
    write_all(target, bytes([HEADER_BYTES]) + salt + prefix)
    room = SEGMENT_BYTES - TAG_BYTES
    now, ahead = bytearray(room), bytearray(room)
    sealed = bytearray(SEGMENT_BYTES)
    number, length = 0, _fill(source, memoryview(now)[: room - HEADER_BYTES])
    while True:
        whole = length == (room if number else room - HEADER_BYTES)
        following = _fill(source, memoryview(ahead)) if whole else 0
        view = memoryview(sealed)[: length + TAG_BYTES]
        nonce = _nonce(prefix, number, last=not following)
        cipher.encrypt_into(nonce, memoryview(now)[:length], None, view)
        write_all(target, view)
        if not following:
            return
        now, ahead, length, number = ahead, now, following, number + 1


def decrypt(source: BinaryIO, target: BinaryIO, *, key: bytes, info: bytes) -> None:
    """Decrypts a stream to its end; `target` gets verified segments only.

    What was written is the whole plaintext only if this returns.

    Raises:
        DamagedSealError: A segment does not verify, or the stream ends early. The key, or `info`,
            may be another stream's.
        OSError: A stream refused.
    """
    header = bytearray(HEADER_BYTES)
    if _fill(source, memoryview(header)) != HEADER_BYTES or header[0] != HEADER_BYTES:
        raise DamagedSealError("The sealed stream has no header; it is cut off or damaged.")
    salt, prefix = bytes(header[1 : 1 + _SALT_BYTES]), bytes(header[1 + _SALT_BYTES :])
    cipher = AESGCM(_derived(key, salt, info))
    now, ahead = bytearray(SEGMENT_BYTES), bytearray(SEGMENT_BYTES)
    plain = bytearray(SEGMENT_BYTES)
    number, length = 0, _fill(source, memoryview(now)[: SEGMENT_BYTES - HEADER_BYTES])
    while True:
        whole = length == (SEGMENT_BYTES if number else SEGMENT_BYTES - HEADER_BYTES)
        following = _fill(source, memoryview(ahead)) if whole else 0
        _open_segment(cipher, prefix, number, not following, memoryview(now)[:length], plain)
        write_all(target, memoryview(plain)[: length - TAG_BYTES])
        if not following:
            return
        now, ahead, length, number = ahead, now, following, number + 1


def sealed_bytes(plain: int) -> int:
    """Returns the length of the stream that `encrypt` makes of `plain` bytes."""
    room = SEGMENT_BYTES - TAG_BYTES
    segments = max(1, -(-(plain + HEADER_BYTES) // room))
    return HEADER_BYTES + plain + segments * TAG_BYTES


def _open_segment(
    cipher: AESGCM, prefix: bytes, number: int, last: bool, sealed: memoryview, plain: bytearray
) -> None:
    where = f"segment {number}{' (the last)' if last else ''}"
    if len(sealed) < TAG_BYTES:
        raise DamagedSealError(f"The sealed stream ends within {where}; it is cut off.")
    view = memoryview(plain)[: len(sealed) - TAG_BYTES]
    try:
        cipher.decrypt_into(_nonce(prefix, number, last=last), sealed, None, view)
    except InvalidTag as error:
        raise DamagedSealError(
            f"The sealed stream does not verify at {where}: it was changed or cut off, or belongs "
            "to another place; restore it from a copy."
        ) from error


def _derived(key: bytes, salt: bytes, info: bytes) -> bytes:
    assert len(key) == KEY_BYTES, len(key)
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(key)


def _nonce(prefix: bytes, number: int, *, last: bool) -> bytes:
    if number >= _MOST_SEGMENTS:
        raise OverflowError("A sealed stream holds at most 2**32 segments of 1 MiB.")
    return prefix + number.to_bytes(4, "big") + bytes([last])


def _fill(source: BinaryIO, view: memoryview) -> int:
    """Reads until the view is full or the stream ends; returns how many bytes."""
    done = 0
    readinto = getattr(source, "readinto", None)
    while done < len(view):
        if readinto is not None:
            got = readinto(view[done:])
        else:
            chunk = source.read(len(view) - done)
            got = len(chunk)
            view[done : done + got] = chunk
        if not got:
            break
        done += got
    return done


def write_all(target: BinaryIO, data: bytes | memoryview) -> None:
    """Writes all of it; a raw stream may take less than it is given."""
    view = memoryview(data)
    while view:
        written = target.write(view)
        view = view[len(view) if written is None else written :]
