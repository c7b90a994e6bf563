"""Signed statements: in-toto Statement v1 in a DSSE envelope, signed with Ed25519.

Sources: https://github.com/secure-systems-lab/dsse (envelope and pre-authentication encoding),
https://github.com/in-toto/attestation/tree/main/spec/v1 (statement).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from forge_harness.canonical import canonical_json, sha256_hex
from forge_harness.errors import SecurityError, SignatureError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"


@dataclass(frozen=True, slots=True)
class Statement:
    """What is claimed, about which files.

    Attributes:
        subject: Name -> SHA-256 of its content, hexadecimal.
        predicate_type: What kind of claim.
        predicate: The claim, JSON values.
    """

    subject: Mapping[str, str]
    predicate_type: str
    predicate: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """Returns the statement as canonical JSON."""
        subject = [{"name": n, "digest": {"sha256": d}} for n, d in sorted(self.subject.items())]
        return canonical_json(
            {
                "_type": STATEMENT_TYPE,
                "subject": subject,
                "predicateType": self.predicate_type,
                "predicate": dict(self.predicate),
            }
        )


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """Returns the bytes a DSSE signature is over (PAE)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def key_id(key: Ed25519PublicKey) -> str:
    """Returns SHA-256 of the raw public key, hexadecimal."""
    return sha256_hex(key.public_bytes_raw())


def sign(statement: Statement, keys: Iterable[Ed25519PrivateKey]) -> bytes:
    """Returns the envelope as JSON, with a signature of each key."""
    payload = statement.to_bytes()
    signed = pre_authentication(PAYLOAD_TYPE, payload)
    signatures = [
        {"keyid": key_id(key.public_key()), "sig": base64.b64encode(key.sign(signed)).decode()}
        for key in keys
    ]
    return canonical_json(
        {
            "payloadType": PAYLOAD_TYPE,
            "payload": base64.b64encode(payload).decode(),
            "signatures": signatures,
        }
    )


def open_envelope(
    envelope: bytes, keys: Sequence[Ed25519PublicKey], *, threshold: int = 1
) -> tuple[Statement, tuple[str, ...]]:
    """Returns the statement of an envelope and the ids of the pinned keys that signed it.

    Nothing of the payload is looked at before the signatures hold.

    Args:
        envelope: JSON.
        keys: Pinned keys.
        threshold: How many different ones must have signed.

    Raises:
        SignatureError: Too few did, or it is no envelope of an in-toto statement.
    """
    pinned = len({key_id(key) for key in keys})
    if not 1 <= threshold <= pinned:
        are = "1 different key is" if pinned == 1 else f"{pinned} different keys are"
        raise SecurityError(
            f"{threshold} signatures are asked for and {are} pinned; pin as many, or lower the "
            "threshold."
        )
    payload_type, payload, signatures = _parsed(envelope)
    signed = pre_authentication(payload_type, payload)
    signers = [key_id(key) for key in keys if any(_holds(key, s, signed) for s in signatures)]
    distinct = tuple(dict.fromkeys(signers))
    if len(distinct) < threshold:
        names = ", ".join(dict.fromkeys(key_id(key)[:12] for key in keys))
        raise SignatureError(
            f"{len(distinct)} of the pinned keys ({names}) signed this and {threshold} must have; "
            "get the package from its owner, or pin the key it was signed with."
        )
    return _statement(payload_type, payload), distinct


def public_key_from_pem(content: bytes) -> Ed25519PublicKey:
    """Reads an Ed25519 public key (SubjectPublicKeyInfo, PEM).

    Raises:
        SecurityError: It is none.
    """
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SecurityError(
            f"No public key can be read ({error}); expected PEM of Ed25519."
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise SecurityError(f"The key is {type(key).__name__}; expected Ed25519.")
    return key


def public_key_to_pem(key: Ed25519PublicKey) -> bytes:
    """Returns a public key as PEM, which openssl reads too."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form)


def _holds(key: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def _parsed(envelope: bytes) -> tuple[str, bytes, list[bytes]]:
    try:
        document = json.loads(envelope)
        payload = base64.b64decode(document["payload"], validate=True)
        signatures = [base64.b64decode(s["sig"], validate=True) for s in document["signatures"]]
        payload_type = document["payloadType"]
        if not isinstance(payload_type, str):
            raise TypeError("payloadType is no text")
        payload_type.encode()  # half of a surrogate pair was never signed
    except (KeyError, TypeError, ValueError, RecursionError, binascii.Error) as error:
        raise SignatureError(
            f"This is no DSSE envelope ({error}); get the signature again."
        ) from error
    return payload_type, payload, signatures


def _statement(payload_type: str, payload: bytes) -> Statement:
    try:
        document = json.loads(payload)
        if payload_type != PAYLOAD_TYPE or document["_type"] != STATEMENT_TYPE:
            raise ValueError(f"payload type {payload_type!r}")
        subject = {entry["name"]: entry["digest"]["sha256"] for entry in document["subject"]}
        if len(subject) != len(document["subject"]):
            raise ValueError("a name twice")
        return Statement(subject, document["predicateType"], document.get("predicate") or {})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise SignatureError(f"What was signed is no in-toto statement ({error}).") from error
