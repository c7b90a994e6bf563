from __future__ import annotations

import io
import os

import pytest
import tink
from hypothesis import given, settings
from hypothesis import strategies as st
from tink import cleartext_keyset_handle, streaming_aead
from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

from forge_harness.errors import DamagedSealError
from forge_harness.security.segments import (
    HEADER_BYTES,
    SEGMENT_BYTES,
    TAG_BYTES,
    decrypt,
    encrypt,
    sealed_bytes,
)

KEY = bytes(range(32))
ROOM = SEGMENT_BYTES - TAG_BYTES
FIRST = ROOM - HEADER_BYTES
LENGTHS = [0, 1, FIRST - 1, FIRST, FIRST + 1, FIRST + ROOM, FIRST + ROOM + 1]


def sealed(plain: bytes, info: bytes = b"info") -> bytes:
    target = io.BytesIO()
    encrypt(io.BytesIO(plain), target, key=KEY, info=info)
    return target.getvalue()


def opened(stream: bytes, info: bytes = b"info", key: bytes = KEY) -> bytes:
    target = io.BytesIO()
    decrypt(io.BytesIO(stream), target, key=key, info=info)
    return target.getvalue()


def tink_primitive() -> streaming_aead.StreamingAead:
    streaming_aead.register()
    key = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(
        version=0,
        key_value=KEY,
        params=aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingParams(
            ciphertext_segment_size=SEGMENT_BYTES,
            derived_key_size=32,
            hkdf_hash_type=common_pb2.SHA256,
        ),
    )
    keyset = tink_pb2.Keyset(
        primary_key_id=1,
        key=[
            tink_pb2.Keyset.Key(
                key_data=tink_pb2.KeyData(
                    type_url="type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey",
                    value=key.SerializeToString(),
                    key_material_type=tink_pb2.KeyData.SYMMETRIC,
                ),
                status=tink_pb2.ENABLED,
                key_id=1,
                output_prefix_type=tink_pb2.RAW,
            )
        ],
    )
    reader = tink.BinaryKeysetReader(keyset.SerializeToString())
    return cleartext_keyset_handle.read(reader).primitive(streaming_aead.StreamingAead)


class Kept(io.BytesIO):
    """Keeps its content when Tink closes it."""

    content = b""

    def close(self) -> None:
        self.content = self.getvalue()
        super().close()


@pytest.mark.parametrize("length", LENGTHS)
def test_tink_opens_what_was_sealed_here(length: int) -> None:
    plain = os.urandom(length)
    source = io.BytesIO(sealed(plain))
    with tink_primitive().new_decrypting_stream(source, b"info") as stream:
        assert stream.read() == plain


@pytest.mark.parametrize("length", LENGTHS)
def test_what_tink_sealed_opens_here(length: int) -> None:
    plain = os.urandom(length)
    target = Kept()
    with tink_primitive().new_encrypting_stream(target, b"info") as stream:
        stream.write(plain)
    assert opened(target.content) == plain


@pytest.mark.parametrize("length", LENGTHS)
def test_length_and_round_trip(length: int) -> None:
    plain = os.urandom(length)
    stream = sealed(plain)
    assert len(stream) == sealed_bytes(length)
    assert opened(stream) == plain


@settings(max_examples=300)
@given(st.data(), st.binary(max_size=300))
def test_a_flipped_bit_anywhere_is_refused(data: st.DataObject, plain: bytes) -> None:
    stream = bytearray(sealed(plain))
    position = data.draw(st.integers(0, len(stream) - 1))
    stream[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedSealError):
        opened(bytes(stream))


def test_bits_of_every_segment_are_bound() -> None:
    stream = sealed(os.urandom(FIRST + ROOM + 10))
    for position in (41, SEGMENT_BYTES - 1, SEGMENT_BYTES, 2 * SEGMENT_BYTES - 1, len(stream) - 1):
        changed = bytearray(stream)
        changed[position] ^= 0x80
        with pytest.raises(DamagedSealError, match="does not verify at segment"):
            opened(bytes(changed))


def test_a_stream_cut_off_anywhere_is_refused() -> None:
    short = sealed(b"twenty bytes of text")
    for length in range(len(short)):
        with pytest.raises(DamagedSealError):
            opened(short[:length])
    long = sealed(os.urandom(FIRST + 2 * ROOM))
    for length in (SEGMENT_BYTES, SEGMENT_BYTES + 1, 2 * SEGMENT_BYTES, len(long) - 1):
        with pytest.raises(DamagedSealError):
            opened(long[:length])


def parts(stream: bytes) -> list[bytes]:
    return [stream[i : i + SEGMENT_BYTES] for i in range(0, len(stream), SEGMENT_BYTES)]


def test_segments_cannot_be_moved_dropped_repeated_appended_or_spliced() -> None:
    first, second, third, last = parts(sealed(os.urandom(FIRST + 2 * ROOM + 7)))
    other = parts(sealed(os.urandom(FIRST + 2 * ROOM + 7)))
    forged = {
        "swap": [first, third, second, last],
        "drop": [first, third, last],
        "drop the last": [first, second, third],
        "repeat": [first, second, second, third, last],
        "repeat the last": [first, second, third, last, last],
        "append": [first, second, third, last + b"x"],
        "splice": [first, other[1], third, last],
        "another head": [other[0], second, third, last],
    }
    for name, segments in forged.items():
        try:
            opened(b"".join(segments))
        except DamagedSealError:
            continue
        pytest.fail(f"{name} was not noticed")
    assert opened(first + second + third + last)


def test_another_key_or_context_is_refused() -> None:
    stream = sealed(b"plain")
    with pytest.raises(DamagedSealError):
        opened(stream, info=b"other")
    with pytest.raises(DamagedSealError):
        opened(stream, key=bytes(32))


def test_nothing_unverified_is_written() -> None:
    stream = bytearray(sealed(os.urandom(FIRST + ROOM)))
    stream[SEGMENT_BYTES + 5] ^= 1
    target = io.BytesIO()
    with pytest.raises(DamagedSealError):
        decrypt(io.BytesIO(bytes(stream)), target, key=KEY, info=b"info")
    assert len(target.getvalue()) == FIRST


class Dribble(io.RawIOBase):
    """Takes and gives a few bytes at a time, as a pipe may."""

    def __init__(self, content: bytes = b"") -> None:
        self.content, self.at = bytearray(content), 0

    def readable(self) -> bool:
        return True

    def readinto(self, view: object) -> int:
        got = self.content[self.at : self.at + min(7, len(view))]  # type: ignore[arg-type]
        view[: len(got)] = got  # type: ignore[index]
        self.at += len(got)
        return len(got)

    def write(self, data: object) -> int:
        self.content += bytes(data)[:11]  # type: ignore[call-overload]
        return min(11, len(data))  # type: ignore[arg-type]


def test_streams_that_take_and_give_little_at_a_time() -> None:
    plain = os.urandom(1000)
    target = Dribble()
    encrypt(Dribble(plain), target, key=KEY, info=b"info")  # type: ignore[arg-type]
    assert opened(bytes(target.content)) == plain
