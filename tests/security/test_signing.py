from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.errors import SecurityError, SignatureError
from forge_harness.security import dsse
from forge_harness.security.openssf import export_signature, p256_key
from forge_harness.security.signing import (
    PREDICATE_TYPE,
    sign_package,
    signature_beside,
    verify_package,
)

SEEDS = [bytes([index]) * 32 for index in range(3)]
KEYS = [Ed25519PrivateKey.from_private_bytes(seed).public_key() for seed in SEEDS]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "package" / "sub").mkdir(parents=True)
    (tmp_path / "package" / "weights.safetensors").write_bytes(os.urandom(5000))
    (tmp_path / "package" / "config.json").write_text("{}")
    (tmp_path / "package" / "sub" / "tokenizer.json").write_text("{}")
    return tmp_path / "package"


def test_what_was_signed_verifies(package: Path) -> None:
    signed = sign_package(package, SEEDS[:1], claim={"quality": 0.98})
    assert (signed.path, signed.files) == (signature_beside(package), 3)
    found = verify_package(package, KEYS)
    assert (found.files, found.claim) == (3, {"quality": 0.98})
    assert found.signers == (dsse.key_id(KEYS[0]),)


def changed(package: Path) -> None:
    path = package / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[2500] ^= 1
    path.write_bytes(content)


def renamed(package: Path) -> None:
    (package / "config.json").rename(package / "config2.json")


def swapped(package: Path) -> None:
    (package / "config.json").write_bytes((package / "weights.safetensors").read_bytes())


ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (changed, "'weights.safetensors' is changed"),
    "removed": (lambda p: (p / "config.json").unlink(), "'config.json' is missing"),
    "added": (lambda p: (p / "evil.py").touch(), "'evil.py' is there and was not signed"),
    "added below": (lambda p: (p / "sub" / "x").touch(), "'sub/x' is there"),
    "hidden": (lambda p: (p / ".hidden").touch(), "'.hidden' is there"),
    "renamed": (renamed, "'config.json' is missing"),
    "swapped": (swapped, "'config.json' is changed"),
    "linked": (lambda p: (p / "link").symlink_to("/etc/hostname"), "is a link"),
    "a linked directory": (lambda p: (p / "link").symlink_to("/etc"), "is a link"),
    "a pipe": (lambda p: os.mkfifo(p / "pipe"), "pipe"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_another_content_is_refused_and_named(package: Path, attack: str) -> None:
    sign_package(package, SEEDS[:1])
    do, sentence = ATTACKS[attack]
    do(package)
    with pytest.raises((SignatureError, SecurityError), match=sentence):
        verify_package(package, KEYS[:1])


def test_only_pinned_keys_count_and_each_once(package: Path) -> None:
    sign_package(package, SEEDS[:2])
    assert len(verify_package(package, KEYS, threshold=2).signers) == 2
    for keys, threshold in ((KEYS[2:], 1), (KEYS, 3), (KEYS[1:], 2)):
        with pytest.raises(SignatureError, match="must have"):
            verify_package(package, keys, threshold=threshold)
    sign_package(package, [SEEDS[0], SEEDS[0]])
    with pytest.raises(SignatureError, match="1 of the pinned keys"):
        verify_package(package, KEYS[:2], threshold=2)
    with pytest.raises(SecurityError, match="1 different key is pinned"):
        verify_package(package, [KEYS[0], KEYS[0]], threshold=2)
    with pytest.raises(SecurityError, match="0 different keys are pinned"):
        verify_package(package, [])


def forged(package: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = signature_beside(package)
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def test_a_changed_payload_type_or_signature_is_refused(package: Path) -> None:
    def resign(document: dict[str, object]) -> None:
        document["signatures"] = [{"keyid": dsse.key_id(KEYS[0]), "sig": "AAAA"}]

    changes: list[Callable[[dict[str, object]], object]] = [
        lambda d: d.update(payload=base64.b64encode(b"{}").decode()),
        lambda d: d.update(payloadType="application/json"),
        lambda d: d.update(payloadType="\ud800"),
        lambda d: d.update(signatures=[]),
        lambda d: d.pop("payload"),
        resign,
    ]
    for change in changes:
        sign_package(package, SEEDS[:1])
        forged(package, change)
        with pytest.raises(SignatureError):
            verify_package(package, KEYS[:1])


def test_a_pipe_in_place_of_the_signature_is_not_waited_for(package: Path) -> None:
    """It may come with the package, out of an archive."""
    os.mkfifo(signature_beside(package))
    found: list[Exception] = []

    def verify() -> None:
        try:
            verify_package(package, KEYS[:1])
        except SignatureError as error:
            found.append(error)

    thread = threading.Thread(target=verify, daemon=True)
    thread.start()
    thread.join(20)
    assert "not a plain file" in str(found)


def test_another_kind_of_statement_of_the_same_key_is_refused(package: Path) -> None:
    statement = dsse.Statement({"a": "0" * 64}, "https://example.org/other", {})
    envelope = dsse.sign(statement, [Ed25519PrivateKey.from_private_bytes(SEEDS[0])])
    signature_beside(package).write_bytes(envelope)
    with pytest.raises(SignatureError, match=PREDICATE_TYPE):
        verify_package(package, KEYS[:1])


def test_missing_and_empty_things_are_sentences(package: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="no signature"):
        verify_package(package, KEYS)
    with pytest.raises(SecurityError, match="No signing key"):
        sign_package(package, [])
    with pytest.raises(SecurityError, match="within what it signs"):
        sign_package(package, SEEDS, signature=package / "sig")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SecurityError, match="nothing to sign"):
        sign_package(tmp_path / "empty", SEEDS)
    with pytest.raises(SecurityError, match="no directory"):
        sign_package(tmp_path / "none", SEEDS)


@given(st.binary(max_size=200))
def test_any_other_bytes_are_no_envelope(content: bytes) -> None:
    with pytest.raises(SignatureError):
        dsse.open_envelope(content, KEYS)


def test_json_too_deep_to_read_is_no_envelope_and_no_statement() -> None:
    deep = b"[" * 100_000
    with pytest.raises(SignatureError, match="no DSSE envelope"):
        dsse.open_envelope(deep, KEYS)
    key = Ed25519PrivateKey.from_private_bytes(SEEDS[0])
    signature = key.sign(dsse.pre_authentication(dsse.PAYLOAD_TYPE, deep))
    envelope = {
        "payloadType": dsse.PAYLOAD_TYPE,
        "payload": base64.b64encode(deep).decode(),
        "signatures": [{"keyid": "", "sig": base64.b64encode(signature).decode()}],
    }
    with pytest.raises(SignatureError, match="no in-toto statement"):
        dsse.open_envelope(json.dumps(envelope).encode(), KEYS)


def test_pre_authentication_encoding_of_the_specification() -> None:
    """The example of DSSE's protocol.md."""
    encoded = dsse.pre_authentication("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_and_sha256sum_agree(package: Path, tmp_path: Path) -> None:
    """Independent of every module here: the envelope by hand, the signature by openssl."""
    document = json.loads(sign_package(package, SEEDS[:1]).path.read_bytes())
    payload = base64.b64decode(document["payload"])
    kind = document["payloadType"].encode()
    (tmp_path / "signed").write_bytes(
        b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
    )
    (tmp_path / "sig").write_bytes(base64.b64decode(document["signatures"][0]["sig"]))
    (tmp_path / "key.pem").write_bytes(dsse.public_key_to_pem(KEYS[0]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "key.pem", "-rawin"]
    command += ["-in", "signed", "-sigfile", "sig"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Verified Successfully" in done.stdout, done.stderr
    for entry in json.loads(payload)["subject"]:
        line = subprocess.run(
            ["sha256sum", package / entry["name"]], capture_output=True, text=True, check=True
        ).stdout
        assert line.split()[0] == entry["digest"]["sha256"]


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    with pytest.raises(SecurityError, match="expected Ed25519"):
        dsse.public_key_from_pem(public_pem(other))
    with pytest.raises(SecurityError, match="expected PEM"):
        dsse.public_key_from_pem(b"-----BEGIN nothing")
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(SecurityError, match="expected PEM of Ed25519"):
        dsse.public_key_from_pem(of_another_curve(public_pem(public)))
    assert dsse.public_key_from_pem(dsse.public_key_to_pem(KEYS[0])) == KEYS[0]


def public_pem(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form)


def of_another_curve(pem: bytes) -> bytes:
    """Returns a key of P-256 said to be of SM2, which openssl has and this library has not."""
    lines = pem.splitlines(keepends=True)
    der = base64.b64decode(b"".join(lines[1:-1]))
    other = der.replace(bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a811ccf5501822d"))
    assert other != der
    return lines[0] + base64.encodebytes(other) + lines[-1]


def private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def test_openssf_model_signing_verifies_the_export(package: Path, tmp_path: Path) -> None:
    verifying = pytest.importorskip("model_signing.verifying", reason="an oracle, in extra dev")
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "public.pem").write_bytes(public_pem(key.public_key()))
    export_signature(package, p256_key(private_pem(key)), tmp_path / "model.sig")

    def verify() -> None:
        verifying.Config().use_elliptic_key_verifier(public_key=tmp_path / "public.pem").verify(
            package, tmp_path / "model.sig"
        )

    verify()
    changed(package)
    with pytest.raises(ValueError, match="mismatch"):
        verify()


def test_openssf_needs_its_own_kind_of_key() -> None:
    wrong = {
        b"no key": "P-256",
        of_another_curve(private_pem(ec.generate_private_key(ec.SECP256R1()))): "P-256",
        private_pem(Ed25519PrivateKey.generate()): "elliptic-curve",
        private_pem(ec.generate_private_key(ec.SECP384R1())): "is secp384r1; .* of P-256",
    }
    for pem, sentence in wrong.items():
        with pytest.raises(SecurityError, match=sentence):
            p256_key(pem)


def test_a_signature_within_what_it_signs_is_refused(package: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(SecurityError, match="within what it signs"):
        export_signature(package, key, package / "model.sig")
    assert not (package / "model.sig").exists()
