from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness.errors import DamagedSealError, WrongKeyError
from forge_harness.security import envelope
from forge_harness.security.keys import Keyring
from forge_harness.security.sealing import HEAD_BYTES, KeyringSealer, key_ids

KEYRING = Keyring.new()
SEALER = KeyringSealer(KEYRING)


@given(st.binary(max_size=200), st.binary(max_size=20))
def test_round_trip_and_context(data: bytes, context: bytes) -> None:
    sealed = SEALER.seal_bytes(data, context=context)
    assert SEALER.unseal_bytes(sealed, context=context) == data
    with pytest.raises(DamagedSealError):
        SEALER.unseal_bytes(sealed, context=context + b"x")


def test_the_same_content_is_never_sealed_the_same_way_twice() -> None:
    sealed = {SEALER.seal_bytes(b"same") for _ in range(50)}
    assert len(sealed) == 50
    assert len({each[HEAD_BYTES:][:40] for each in sealed}) == 50


@settings(max_examples=300)
@given(st.data())
def test_a_flipped_bit_anywhere_is_refused_or_of_the_free_slot(data: st.DataObject) -> None:
    sealed = bytearray(SEALER.seal_bytes(b"some content"))
    position = data.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= 1 << data.draw(st.integers(0, 7))
    free = range(HEAD_BYTES - envelope.SLOT_BYTES, HEAD_BYTES)
    if position in free:
        # Nothing is read from there unless it names a key of the ring.
        assert SEALER.unseal_bytes(bytes(sealed)) == b"some content"
        return
    with pytest.raises((DamagedSealError, WrongKeyError)):
        SEALER.unseal_bytes(bytes(sealed))


def test_another_keyring_is_told_from_damage() -> None:
    sealed = SEALER.seal_bytes(b"x")
    with pytest.raises(WrongKeyError, match=f"under key {KEYRING.active_id()}"):
        KeyringSealer(Keyring.new()).unseal_bytes(sealed)
    with pytest.raises(DamagedSealError, match="not sealed"):
        SEALER.unseal_bytes(b"plain text that is long enough to hold a head" * 9)
    with pytest.raises(DamagedSealError, match="not sealed"):
        SEALER.unseal_bytes(sealed[: HEAD_BYTES - 1])


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    plain, sealed, back = tmp_path / "plain", tmp_path / "sealed", tmp_path / "back"
    plain.write_bytes(os.urandom(3_000_000))
    SEALER.seal_file(plain, sealed)
    assert SEALER.is_sealed(sealed)
    assert not SEALER.is_sealed(plain)
    SEALER.unseal_file(sealed, back)
    assert back.read_bytes() == plain.read_bytes()
    assert back.stat().st_mode & 0o077 == 0
    content = bytearray(sealed.read_bytes())
    content[-1] ^= 1
    sealed.write_bytes(content)
    with pytest.raises(DamagedSealError):
        SEALER.unseal_file(sealed, tmp_path / "never")
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "sealed", "back"}


def test_rotation_changes_the_head_only(tmp_path: Path) -> None:
    path = tmp_path / "sealed"
    path.write_bytes(SEALER.seal_bytes(b"content" * 1000))
    path.chmod(0o400)
    before, inode = path.read_bytes(), path.stat().st_ino
    rotated = KEYRING.rotated()
    sealer = KeyringSealer(rotated)
    assert sealer.rewrap_file(path)
    assert not sealer.rewrap_file(path)
    after = path.read_bytes()
    assert (after[HEAD_BYTES:], path.stat().st_ino) == (before[HEAD_BYTES:], inode)
    assert path.stat().st_mode & 0o777 == 0o400
    assert key_ids(path) == (rotated.active_id(),)
    assert KeyringSealer(rotated.destroyed(KEYRING.active_id())).unseal_bytes(after)
    with pytest.raises(WrongKeyError):
        SEALER.unseal_bytes(after)
    again = sealer.rewrap_bytes(before)
    assert again is not None
    assert sealer.unseal_bytes(again) == b"content" * 1000
    assert sealer.rewrap_bytes(again) is None


@pytest.mark.parametrize("cut", range(0, 2 * HEAD_BYTES + 1, 8))
def test_a_rotation_torn_anywhere_still_opens_and_completes(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "sealed"
    sealed = SEALER.seal_bytes(b"content")
    rotated = KEYRING.rotated()
    heads = envelope.rewrapped(envelope.Head.parse(sealed[:HEAD_BYTES]), rotated)
    assert heads is not None
    both, alone = (head.encode() for head in heads)
    first, second = min(cut, HEAD_BYTES), max(0, cut - HEAD_BYTES)
    torn = both[:first] + sealed[first:HEAD_BYTES]
    torn = alone[:second] + torn[second:]
    path.write_bytes(torn + sealed[HEAD_BYTES:])
    sealer = KeyringSealer(rotated)
    assert sealer.unseal_bytes(path.read_bytes()) == b"content"
    sealer.rewrap_file(path)
    assert key_ids(path) == (rotated.active_id(),)
    assert sealer.unseal_bytes(path.read_bytes()) == b"content"


def test_no_read_fails_while_keys_rotate(tmp_path: Path) -> None:
    path, content = tmp_path / "sealed", os.urandom(5000)
    state = {"keyring": KEYRING}
    sealer = KeyringSealer(lambda: state["keyring"])
    path.write_bytes(sealer.seal_bytes(content))
    failures: list[BaseException] = []
    reads = [0, 0]
    done = threading.Event()

    def read(reader: int) -> None:
        while not done.is_set():
            try:
                assert sealer.unseal_bytes(path.read_bytes()) == content
            except BaseException as error:
                failures.append(error)
                return
            reads[reader] += 1

    readers = [threading.Thread(target=read, args=(index,)) for index in range(2)]
    for reader in readers:
        reader.start()
    rotations = 0
    while rotations < 50 or (min(reads) < 500 and not failures):
        state["keyring"] = state["keyring"].rotated()
        assert sealer.rewrap_file(path)
        rotations += 1
    done.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert min(reads) >= 500


KILLED = """
import os, signal, sys
from pathlib import Path
from forge_harness.security import envelope
from forge_harness.security.keys import Keyring
real, left = os.pwrite, int(sys.argv[3])
def dying(descriptor, data, offset):
    global left
    left -= 1
    if left == 0:
        real(descriptor, data[:40], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(descriptor, data, offset)
os.pwrite = dying
envelope.rewrap_file(Path(sys.argv[1]), Keyring.from_bytes(Path(sys.argv[2]).read_bytes()))
"""


@pytest.mark.parametrize("write", [1, 2])
def test_killed_within_a_write_the_file_opens(tmp_path: Path, write: int) -> None:
    path, keys, rotated = tmp_path / "sealed", tmp_path / "keys", KEYRING.rotated()
    path.write_bytes(SEALER.seal_bytes(b"content"))
    keys.write_bytes(rotated.to_bytes())
    command = [sys.executable, "-c", KILLED, str(path), str(keys), str(write)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    sealer = KeyringSealer(rotated)
    assert sealer.unseal_bytes(path.read_bytes()) == b"content"
    sealer.rewrap_file(path)
    assert key_ids(path) == (rotated.active_id(),)
