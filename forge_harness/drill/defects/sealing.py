"""Sealers that leave one binding out, keys that rotate badly, and stores that seal nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.drill.defects.state import KeepsIn
from forge_harness.drill.target import open_store
from forge_harness.errors import WrongKeyError
from forge_harness.security.keys import Keyring, Purpose
from forge_harness.security.sealing import KeyringSealer
from forge_harness.state import NewState, Store
from forge_harness.subject.reference import ReferenceSubject

SEGMENT = 1 << 18
_FILE, _NONCE, _TAG = 16, 12, 16
_KEY = bytes(range(32))


class Segments:
    """AES-GCM segments of a scheme of its own; subclasses leave one binding out."""

    head_bytes = 0

    def __init__(self) -> None:
        self._cipher = AESGCM(_KEY)

    def seal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """See `ContentSealer.seal_bytes`."""
        parts = [data[i : i + SEGMENT] for i in range(0, max(1, len(data)), SEGMENT)]
        sealed = file = self.new_file(context)
        for number, part in enumerate(parts):
            nonce = self.new_nonce(file, number)
            bound = self.bound(context, file, number, number == len(parts) - 1)
            sealed += nonce + self._cipher.encrypt(nonce, part, bound)
        return sealed

    def unseal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """See `ContentSealer.unseal_bytes`."""
        file, plain = data[:_FILE], b""
        starts = self.segment_starts(max(_FILE + 1, len(data)))
        for number, start in enumerate(starts):
            part = data[start : start + SEGMENT + _NONCE + _TAG]
            bound = self.bound(context, file, number, number == len(starts) - 1)
            plain += self.opened(part[:_NONCE], part[_NONCE:], bound)
        return plain

    def segment_starts(self, length: int) -> Sequence[int]:
        """See `ContentSealer.segment_starts`."""
        return range(_FILE, length, SEGMENT + _NONCE + _TAG)

    def bound(self, context: bytes, file: bytes, number: int, last: bool) -> bytes:
        """What a segment is bound to."""
        return context + file + number.to_bytes(4, "big") + bytes([last])

    def new_file(self, context: bytes) -> bytes:
        """What tells one sealed content from others."""
        return os.urandom(_FILE)

    def new_nonce(self, file: bytes, number: int) -> bytes:
        """The nonce of a segment."""
        return os.urandom(_NONCE)

    def opened(self, nonce: bytes, sealed: bytes, bound: bytes) -> bytes:
        """The plaintext of a segment."""
        return self._cipher.decrypt(nonce, sealed, bound)


class Positionless(Segments):
    """Segments do not know which one they are."""

    def bound(self, context: bytes, file: bytes, number: int, last: bool) -> bytes:
        """See `Segments.bound`."""
        return context + file + bytes([last])


class Fileless(Segments):
    """Segments do not know which content they belong to."""

    def bound(self, context: bytes, file: bytes, number: int, last: bool) -> bytes:
        """See `Segments.bound`."""
        return context + number.to_bytes(4, "big") + bytes([last])


class Endless(Segments):
    """Segments do not know whether they are the last."""

    def bound(self, context: bytes, file: bytes, number: int, last: bool) -> bytes:
        """See `Segments.bound`."""
        return context + file + number.to_bytes(4, "big")


class Contextless(Segments):
    """Segments are not bound to what the caller says they are for."""

    def bound(self, context: bytes, file: bytes, number: int, last: bool) -> bytes:
        """See `Segments.bound`."""
        return file + number.to_bytes(4, "big") + bytes([last])


class NonceOfTheName(Segments):
    """Nonces follow from what a content is for and the segment's number."""

    def new_file(self, context: bytes) -> bytes:
        """See `Segments.new_file`."""
        return hashlib.sha256(context).digest()[:_FILE]

    def new_nonce(self, file: bytes, number: int) -> bytes:
        """See `Segments.new_nonce`."""
        return file[: _NONCE - 4] + number.to_bytes(4, "big")


class NonceCounter(Segments):
    """Nonces are counted from zero by each sealer, so two sealers of one key draw the same."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def new_file(self, context: bytes) -> bytes:
        """See `Segments.new_file`."""
        self._count += 1
        return self._count.to_bytes(_FILE, "big")

    def new_nonce(self, file: bytes, number: int) -> bytes:
        """See `Segments.new_nonce`."""
        return file[-(_NONCE - 4) :] + number.to_bytes(4, "big")


class TagIgnored(Segments):
    """What does not verify is returned all the same, as a reader that streams does."""

    def opened(self, nonce: bytes, sealed: bytes, bound: bytes) -> bytes:
        """See `Segments.opened`."""
        try:
            return super().opened(nonce, sealed, bound)
        except InvalidTag:
            # The stream of GCM: counter mode from the second block on.
            stream = Cipher(AES(_KEY), CTR(nonce + (2).to_bytes(4, "big"))).encryptor()
            return stream.update(sealed[:-_TAG]) + stream.finalize()


class Unauthenticated(Segments):
    """Encrypted in counter mode, and not authenticated."""

    def _crypt(self, nonce: bytes, data: bytes) -> bytes:
        stream = Cipher(AES(_KEY), CTR(nonce)).encryptor()
        return stream.update(data) + stream.finalize()

    def seal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """See `ContentSealer.seal_bytes`."""
        nonce = os.urandom(_FILE)
        return nonce + self._crypt(nonce, data)

    def unseal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """See `ContentSealer.unseal_bytes`."""
        return self._crypt(data[:_FILE], data[_FILE:])


class Undeclared:
    """Segments that do not know which one they are, and a content declared to be one of them."""

    head_bytes = 0

    def __init__(self) -> None:
        inner = Positionless()
        self.seal_bytes, self.unseal_bytes = inner.seal_bytes, inner.unseal_bytes

    def segment_starts(self, length: int) -> Sequence[int]:
        """See `ContentSealer.segment_starts`."""
        return [0]


class OneMessage:
    """A content is one message of AES-GCM: nonce, ciphertext, tag."""

    head_bytes = 0

    def __init__(self) -> None:
        self._cipher = AESGCM(_KEY)

    def seal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """See `ContentSealer.seal_bytes`."""
        nonce = os.urandom(_NONCE)
        return nonce + self._cipher.encrypt(nonce, data, context)

    def unseal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """See `ContentSealer.unseal_bytes`."""
        return self._cipher.decrypt(data[:_NONCE], data[_NONCE:], context)

    def segment_starts(self, length: int) -> Sequence[int]:
        """See `ContentSealer.segment_starts`."""
        return [_NONCE]


class OneMessageContextless(OneMessage):
    """One message, which is not bound to what the caller says it is for."""

    def seal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """See `ContentSealer.seal_bytes`."""
        return super().seal_bytes(data)

    def unseal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """See `ContentSealer.unseal_bytes`."""
        return super().unseal_bytes(data)


class SealsWith(ReferenceSubject):
    """The reference subject with another sealer.

    Args:
        sealer: Makes it.
    """

    def __init__(self, sealer: Callable[[], Any]) -> None:
        self._sealer = sealer

    def content_sealer(self) -> Any:
        """See `SealsContent.content_sealer`."""
        return self._sealer()


class _RewritesModels(KeyringSealer):
    def rewrap_file(self, path: Path) -> bool:
        # Beside it and renamed: written in place, which of the readers notices is chance.
        beside = path.with_name(f"{path.name}.new")
        beside.write_bytes(self.seal_bytes(self.unseal_bytes(path.read_bytes())))
        beside.replace(path)
        return True


class Rewriting(ReferenceSubject):
    """A rotation seals every file anew."""

    def content_sealer(self) -> KeyringSealer:
        """See `SealsContent.content_sealer`."""
        return _RewritesModels(self._keys)


class _SkipsUnknownKeys(KeyringSealer):
    def rewrap_file(self, path: Path) -> bool:
        with contextlib.suppress(WrongKeyError):
            return super().rewrap_file(path)
        return False


class Forgetful(ReferenceSubject):
    """A rotation drops the old key, and passes over files that it does not open any more."""

    def content_sealer(self) -> KeyringSealer:
        """See `SealsContent.content_sealer`."""
        return _SkipsUnknownKeys(self._keys)

    def rotate_seal_key(self) -> None:
        """See `SealsContent.rotate_seal_key`."""
        self._keyring = Keyring.new()


class Undead(ReferenceSubject):
    """Destroying keys keeps them."""

    def destroy_old_seal_keys(self) -> None:
        """See `SealsContent.destroy_old_seal_keys`."""


class _KeyOfEverybody(Keyring):
    """A ring whose keys have names and are zeros."""

    def active(self, purpose: Purpose = Purpose.SEAL) -> bytes:
        return bytes(32)

    def usable(self, key_id: str, purpose: Purpose = Purpose.SEAL) -> bytes | None:
        return bytes(32) if key_id in self.usable_ids(purpose) else None


class WrapsUnderZeros(ReferenceSubject):
    """The head of a content names a key, and what it wraps is wrapped under zeros."""

    def content_sealer(self) -> KeyringSealer:
        """See `SealsContent.content_sealer`."""
        return KeyringSealer(lambda: _KeyOfEverybody(self._keys().keys))


def plain_store(root: Path, **options: Any) -> Store:
    """Opens a store that takes a key and does not use it."""
    options.pop("sealer", None)
    return Store.open(root, **options)


class _SpoolsPlain(Store):
    """Keeps what it was given beside the store, for whoever repeats a commit that failed."""

    def commit(self, states: Sequence[NewState], **options: Any) -> Any:
        spool = self.root / "spool"
        contents = [data for state in states for data in state.files.values()]
        spool.write_bytes(b"".join(data for data in contents if isinstance(data, bytes)))
        return super().commit(states, **options)


spooling_store = _SpoolsPlain.open


def versioned_store(root: Path, **options: Any) -> Store:
    """Opens a store with a plain file of its own, which says what layout it has."""
    store = Store.open(root, **options)
    (root / "VERSION").write_text("layout 7\n", encoding="utf-8")
    return store


def taken_apart(subject: Any) -> object:
    """How a sealed content opens that was rearranged, changed, renamed, or sealed once more."""
    sealer = subject.content_sealer()
    plain = hashlib.shake_256(b"plain").digest(7 << 19)
    sealed, other = (sealer.seal_bytes(each, context=b"a") for each in (plain, plain[::-1]))
    starts = list(sealer.segment_starts(len(sealed)))
    again = subject.content_sealer().seal_bytes(plain, context=b"a")
    second, third, fourth = starts[1:4] if len(starts) > 3 else (len(sealed) // 2,) * 3
    forms = {
        "whole": sealed,
        "turned": sealed[:second] + sealed[third:fourth] + sealed[second:third] + sealed[fourth:],
        "mixed": sealed[:second] + other[second:],
        "short": sealed[: starts[-1] or second],
        "flipped": sealed[:-40] + bytes([sealed[-40] ^ 1]) + sealed[-39:],
        "once more": again,
    }
    seen = {name: _opening(sealer, form, plain) for name, form in forms.items()}
    return seen, _opening(sealer, sealed, plain, context=b"b"), sealed == again, len(starts) > 1


def _opening(sealer: Any, form: bytes, plain: bytes, context: bytes = b"a") -> str:
    try:
        return "plain" if sealer.unseal_bytes(form, context=context) == plain else "other"
    except Exception:  # sealers refuse each with an error of its own
        return "refused"


def rotated(subject: Any) -> object:
    """Which bytes of a file a rotation changes, and what opens before and after old keys end."""
    sealer, plain = subject.content_sealer(), hashlib.shake_256(b"plain").digest(4000)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sealed"
        file.write_bytes(sealer.seal_bytes(plain))
        old = file.read_bytes()
        subject.rotate_seal_key()
        seen: list[object] = [_opening(sealer, old, plain, b"")]
        try:
            seen.append(sealer.rewrap_file(file))
        except Exception as error:  # how it refuses is what is observed
            seen.append(type(error).__name__)
        new = file.read_bytes()
        seen.append(any(a != b for a, b in zip(old[200:], new[200:], strict=True)))
        subject.destroy_old_seal_keys()
        seen += [_opening(sealer, form, plain, b"") for form in (old, new)]
        # The name of the new key in the head of the old content, wherever it is.
        named = sealer.seal_bytes(plain)
        renamed = [old[:i] + named[i : i + 8] + old[i + 8 :] for i in range(0, 100, 4)]
        return [*seen, [_opening(sealer, form, plain, b"") for form in renamed]]


def kept_sealed(subject: Any) -> object:
    """In how many files of a sealed store a content can be found as it was given."""
    needle = b"as it was given" * 9
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        opener = subject.state_store().opener
        with open_store(opener, root, sealer=subject.content_sealer()) as store:
            for size in (1, 1000):
                files = {"data": needle * size}
                store.commit([NewState(phase="phase5", kind="k", name=f"n{size}", files=files)])
        found = [path for path in root.rglob("*") if path.is_file()]
        return sum(needle in path.read_bytes() for path in found)


_SEEDED = partial(Defect, stage=Stage.SECURITY, alive=taken_apart, subtlety=4)


DEFECTS: tuple[Defect, ...] = (
    _SEEDED(
        id="X04_segments_without_position",
        title="Sealed segments can change places: they are not bound to their number",
        check="security.chunk_binding",
        shows="moved_opened is",
        subject=partial(SealsWith, Positionless),
    ),
    _SEEDED(
        id="X04_segments_without_file",
        title="Sealed segments of one content can stand in another: they are not bound to theirs",
        check="security.chunk_binding",
        shows="spliced",
        subject=partial(SealsWith, Fileless),
    ),
    _SEEDED(
        id="X04_segments_without_end",
        title="A sealed content can be cut off at a segment: the last one is not marked",
        check="security.chunk_binding",
        shows="segment 12 dropped",
        subject=partial(SealsWith, Endless),
    ),
    _SEEDED(
        id="X04_context_not_bound",
        title="A sealed content opens in place of another: its context is not bound",
        check="security.chunk_binding",
        shows="other_context_refused is False",
        subject=partial(SealsWith, Contextless),
    ),
    _SEEDED(
        id="X04_unauthenticated",
        title="Contents are encrypted in counter mode, and not authenticated",
        check="security.chunk_binding",
        shows="opened as something else",
        subject=partial(SealsWith, Unauthenticated),
        source="anusii/solidpod#663",
        subtlety=3,
    ),
    _SEEDED(
        id="X04_tag_ignored",
        title="A tag that does not verify is ignored, and the plaintext returned",
        check="security.chunk_binding",
        shows="opened as something else",
        subject=partial(SealsWith, TagIgnored),
        source="hitesh22rana/chronoverse#101",
    ),
    _SEEDED(
        id="X04_segments_not_declared",
        title="A content is declared to be one segment, and nothing is known of its parts",
        check="security.chunk_binding",
        shows="overhead_by_length is",
        subject=partial(SealsWith, Undeclared),
    ),
    _SEEDED(
        id="X04_one_message_without_context",
        title="A content is one message, and opens in place of another: its context is not bound",
        check="security.chunk_binding",
        shows="other_context_refused is False",
        subject=partial(SealsWith, OneMessageContextless),
    ),
    _SEEDED(
        id="X03_nonce_of_the_name",
        title="Nonces follow from the name of a content: two versions of it share them",
        check="security.chunk_binding",
        shows="spliced",
        subject=partial(SealsWith, NonceOfTheName),
        source="OpenIDC/liboauth2#26",
    ),
    _SEEDED(
        id="X03_nonce_counter_restarts",
        title="Nonces are counted from zero after every start, under the same key",
        check="security.chunk_binding",
        shows="keystreams_used_twice is",
        subject=partial(SealsWith, NonceCounter),
        source="wolfSSL/wolfssl#11175",
        subtlety=5,
    ),
    _SEEDED(
        id="rotation_rewrites_models",
        title="A rotation of keys seals every file anew, whatever its size",
        check="security.key_rotation",
        shows="bytes_changed is",
        subject=Rewriting,
        alive=rotated,
        subtlety=3,
    ),
    _SEEDED(
        id="rotation_forgets_the_old_key",
        title="A rotation drops the old key, and passes over the files that are under it",
        check="security.key_rotation",
        shows="is sealed under key",
        subject=Forgetful,
        alive=rotated,
        subtlety=2,
    ),
    _SEEDED(
        id="rotation_destroyed_keys_open",
        title="Keys that were destroyed still open what they sealed",
        check="security.key_rotation",
        shows="old_key_gone is False",
        subject=Undead,
        alive=rotated,
        subtlety=3,
    ),
    _SEEDED(
        id="rotation_wraps_under_zeros",
        title="The head of a sealed content names a key, and the data key is wrapped under zeros",
        check="security.key_rotation",
        shows="opened_by_another_key is",
        subject=WrapsUnderZeros,
        alive=rotated,
        subtlety=5,
    ),
    _SEEDED(
        id="sealed_store_seals_nothing",
        title="A store takes a key and does not use it",
        check="security.encryption_at_rest",
        shows="files_with_plaintext is",
        subject=partial(KeepsIn, f"{__name__}:plain_store"),
        alive=kept_sealed,
        subtlety=2,
    ),
    _SEEDED(
        id="sealed_store_spools_plaintext",
        title="A sealed store keeps the plaintext of its last commit beside it",
        check="security.encryption_at_rest",
        shows="files_with_plaintext is",
        subject=partial(KeepsIn, f"{__name__}:spooling_store"),
        alive=kept_sealed,
        subtlety=3,
    ),
    _SEEDED(
        id="sealed_store_declares_its_spool",
        title="A sealed store keeps the plaintext of its last commit in a file it declares plain",
        check="security.encryption_at_rest",
        shows="files_with_plaintext is",
        subject=partial(KeepsIn, f"{__name__}:spooling_store", frozenset({"spool"})),
        alive=kept_sealed,
    ),
)
"""Sealers, key rings, and stores."""

BENIGN: tuple[Benign, ...] = (
    Benign(
        id="sealed_in_segments_of_another_size",
        title="Contents are sealed in segments of another scheme, all of whose parts are bound",
        subject=partial(SealsWith, Segments),
        checks=("security.chunk_binding",),
    ),
    Benign(
        id="sealed_as_one_message",
        title="A content is sealed as one message of AES-GCM",
        subject=partial(SealsWith, OneMessage),
        checks=("security.chunk_binding",),
    ),
    Benign(
        id="sealed_store_with_a_version_file",
        title="A sealed store has a plain file of its own, which it declares",
        subject=partial(KeepsIn, f"{__name__}:versioned_store", frozenset({"VERSION"})),
        checks=("security.encryption_at_rest",),
    ),
)
