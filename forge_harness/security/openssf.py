"""Signatures in the format of OpenSSF model signing 1.0, for users of its tools.

A sigstore bundle (v0.3) with a DSSE envelope over an in-toto statement whose predicate lists the
files (https://github.com/sigstore/model-transparency). Its `key` method takes elliptic-curve keys
only, so this one is P-256, not the Ed25519 key of our own signatures. Verify with
`model_signing verify key MODEL --signature SIG --public_key PEM`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from forge_harness.durable import write_durably
from forge_harness.errors import SecurityError
from forge_harness.paths import resolved_path

from . import dsse
from .signing import check_outside, digests

PREDICATE_TYPE = "https://model_signing/signature/v1.0"
GIT_FILES = (".git", ".gitattributes", ".github", ".gitignore")
"""What `model_signing verify` leaves out of a model, and then misses, unless told not to."""
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"


def p256_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Reads the private key `export_signature` signs with: P-256, PEM, not encrypted.

    Raises:
        SecurityError: It is another one.
    """
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        # Not the parser's message: nothing of a private key belongs into one.
        raise SecurityError("The private key cannot be read; expected P-256 in PEM.") from None
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp256r1":
        return key
    kind = key.curve.name if isinstance(key, ec.EllipticCurvePrivateKey) else type(key).__name__
    raise SecurityError(
        f"The private key is {kind}; OpenSSF's tools take elliptic-curve keys of P-256: "
        "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
    )


def export_signature(directory: Path, key: ec.EllipticCurvePrivateKey, target: Path) -> None:
    """Writes the signature of a package for OpenSSF's tools, durably.

    Args:
        directory: Must not change any more.
        key: See `p256_key`.
        target: Outside of `directory`.

    Raises:
        SecurityError: The directory cannot be signed, or the target lies within it.
    """
    check_outside(target, directory)
    payload = _payload(directory)
    signed = dsse.pre_authentication(dsse.PAYLOAD_TYPE, payload)
    signature = key.sign(signed, ec.ECDSA(hashes.SHA256()))
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    bundle = {
        "mediaType": _MEDIA_TYPE,
        "verificationMaterial": {
            "publicKey": {"hint": hashlib.sha256(public).hexdigest()},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": dsse.PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    write_durably(target, json.dumps(bundle).encode())


def holds_git_files(directory: Path) -> bool:
    """Whether a package has files of git, as one from a hub has its `.gitattributes`."""
    return any((directory / name).exists() for name in GIT_FILES)


def _payload(directory: Path) -> bytes:
    """The statement: files by name, and as its subject the digest over their digests."""
    files = dict(sorted(digests(directory).items()))
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in files.values()))
    resources = [{"name": n, "algorithm": "sha256", "digest": d} for n, d in files.items()]
    statement = {
        "_type": dsse.STATEMENT_TYPE,
        "subject": [
            {"name": resolved_path(directory).name, "digest": {"sha256": root.hexdigest()}}
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": resources,
        },
    }
    return json.dumps(statement).encode()
