"""Security, sealing: each check goes red for a subject whose encryption has one seeded defect."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap as keyunwrap
from cryptography.hazmat.primitives.keywrap import aes_key_wrap as keywrap

from forge_harness.security import envelope
from forge_harness.security.keys import Keyring
from forge_harness.security.sealing import KeyringSealer
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

SEGMENT = 1 << 18
FILE = 16


@pytest.mark.parametrize("check", ["chunk_binding", "key_rotation"])
def test_the_reference_passes(run_check, check):
    run = run_check(f"security.{check}", ReferenceSubject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


class Segments:
    """AES-GCM segments of a scheme of its own; subclasses leave one binding out."""

    head_bytes = 0

    def __init__(self):
        self.key = AESGCM(bytes(range(32)))

    def bound(self, context, file, number, last):
        return context + file + number.to_bytes(4, "big") + bytes([last])

    def seal_bytes(self, data, *, context=b""):
        parts = [data[i : i + SEGMENT] for i in range(0, max(1, len(data)), SEGMENT)]
        sealed = file = os.urandom(FILE)
        for number, part in enumerate(parts):
            nonce = os.urandom(12)
            bound = self.bound(context, file, number, number == len(parts) - 1)
            sealed += nonce + self.key.encrypt(nonce, part, bound)
        return sealed

    def unseal_bytes(self, data, *, context=b""):
        file, plain, starts = data[:FILE], b"", self.segment_starts(max(FILE + 1, len(data)))
        for number, start in enumerate(starts):
            part = data[start : start + SEGMENT + 28]
            bound = self.bound(context, file, number, number == len(starts) - 1)
            plain += self.key.decrypt(part[:12], part[12:], bound)
        return plain

    def segment_starts(self, length):
        return range(FILE, length, SEGMENT + 28)


class Positionless(Segments):
    def bound(self, context, file, number, last):
        return context + file + bytes([last])


class Fileless(Segments):
    def bound(self, context, file, number, last):
        return context + number.to_bytes(4, "big") + bytes([last])


class Endless(Segments):
    def bound(self, context, file, number, last):
        return context + file + number.to_bytes(4, "big")


class Contextless(Segments):
    def bound(self, context, file, number, last):
        return file + number.to_bytes(4, "big") + bytes([last])


class Unauthenticated(Segments):
    """Encrypted, but not authenticated."""

    def _crypt(self, nonce, data):
        stream = Cipher(AES(bytes(32)), CTR(nonce)).encryptor()
        return stream.update(data) + stream.finalize()

    def seal_bytes(self, data, *, context=b""):
        nonce = os.urandom(16)
        return nonce + self._crypt(nonce, data)

    def unseal_bytes(self, data, *, context=b""):
        return self._crypt(data[:16], data[16:])


class WholeFile(Segments):
    """One segment, so that nothing can be said about segments."""

    def segment_starts(self, length):
        return [0]


def with_sealer(sealer):
    class Subject(ReferenceSubject):
        def content_sealer(self):
            return sealer()

    return Subject()


@pytest.mark.parametrize(
    ("sealer", "reason"),
    [
        (Positionless, "moved_opened is"),
        (Fileless, "spliced"),
        (Endless, "segment 12 dropped"),
        (Contextless, "other_context_refused is False"),
        (Unauthenticated, "opened as something else"),
        (WholeFile, "segments is 1"),
    ],
)
def test_a_missing_binding_is_found(run_check, sealer, reason):
    run = run_check("security.chunk_binding", with_sealer(sealer))
    assert run.outcome is Outcome.FAIL
    assert reason in run.reason


def test_a_scheme_of_another_layout_passes(run_check):
    run = run_check("security.chunk_binding", with_sealer(Segments))
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


class RewritesModels(KeyringSealer):
    def rewrap_file(self, path):
        path.write_bytes(self.seal_bytes(self.unseal_bytes(path.read_bytes())))
        return True


class Rewriting(ReferenceSubject):
    """Rotation seals every file anew, in place."""

    def content_sealer(self):
        return RewritesModels(self._keys)


class Forgetful(ReferenceSubject):
    """Rotation drops the old key before the files are under the new one."""

    def rotate_seal_key(self):
        self._keyring = Keyring.new()


class Undead(ReferenceSubject):
    """Destroying keys keeps them."""

    def destroy_old_seal_keys(self):
        pass


def test_a_key_that_everybody_has_is_found(run_check, monkeypatch):
    """The head names the key, and what is wrapped is wrapped under zeros."""
    monkeypatch.setattr(envelope, "aes_key_wrap", lambda key, data: keywrap(bytes(32), data))
    monkeypatch.setattr(envelope, "aes_key_unwrap", lambda key, data: keyunwrap(bytes(32), data))
    run = run_check("security.key_rotation", ReferenceSubject())
    assert run.outcome is Outcome.FAIL
    assert "opened_by_another_key is" in run.reason


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (Rewriting, ("bytes_changed is", "failed_reads is")),
        (Forgetful, ("failed_reads is", "is sealed under key")),
        (Undead, ("old_key_gone is False",)),
    ],
)
def test_a_bad_rotation_is_found(run_check, subject, reason):
    run = run_check("security.key_rotation", subject())
    assert run.outcome in (Outcome.FAIL, Outcome.ERROR)
    assert any(part in run.reason for part in reason), run.reason
