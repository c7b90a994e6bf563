"""Keyrings: which keys there are, what each is for, and which may still be used.

A keyring is JSON. It holds key-encryption keys for sealing and keys for the audit log, tokens and
signatures, each 32 random bytes with an id. One key a purpose is active; a rotation makes a new one
and leaves the old one decrypt-only, so that what it wrote stays readable until it is rewrapped.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from forge_harness.canonical import canonical_json
from forge_harness.errors import MissingKeyError, SecurityError

SCHEMA = "forge-keyring/1"
KEY_BYTES = 32
_ID_BYTES = 8


class Purpose(StrEnum):
    """What a key is used for; never more than one thing."""

    SEAL = "seal"
    """Wraps the data keys of sealed files (AES-256)."""
    AUDIT = "audit"
    """Chains the audit log (HMAC-SHA-256)."""
    TOKENS = "tokens"
    """Hashes access tokens (HMAC-SHA-256)."""
    SIGN = "sign"
    """Signs packages and audit heads (seed of an Ed25519 key)."""


class KeyState(StrEnum):
    """What a key may still be used for."""

    ACTIVE = "active"
    DECRYPT_ONLY = "decrypt-only"
    """Opens and verifies what it wrote; writes nothing new."""
    DESTROYED = "destroyed"
    """Its bytes are gone; the id stays, so that its loss can be told from a wrong keyring."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key.

    Attributes:
        id: 16 hexadecimal digits, random.
        purpose: What it is for.
        state: What it may still do.
        created_at: UTC, ISO 8601.
        changed_at: Of its last change of state.
        material: 32 bytes; empty once destroyed. Not in the representation.
    """

    id: str
    purpose: Purpose
    state: KeyState
    created_at: str
    changed_at: str
    material: bytes = field(repr=False)


class Keyring:
    """An immutable set of keys; changes return a new keyring.

    Args:
        keys: Of all purposes.

    Raises:
        SecurityError: Two keys share an id, or two are active for one purpose.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self.keys = tuple(keys)
        active = [key.purpose for key in self.keys if key.state is KeyState.ACTIVE]
        if len(set(active)) != len(active) or len({k.id for k in self.keys}) != len(self.keys):
            raise SecurityError(
                "The keyring has two active keys of one purpose, or two keys of one id; restore it "
                "from a copy."
            )

    @classmethod
    def new(cls, purposes: Iterable[Purpose] = tuple(Purpose)) -> Keyring:
        """Returns a keyring with one fresh key a purpose."""
        return cls(_fresh(purpose) for purpose in purposes)

    def rotated(self, purpose: Purpose = Purpose.SEAL) -> Keyring:
        """Returns a keyring with a fresh active key; the former one becomes decrypt-only."""
        now = _now()
        former = (
            replace(key, state=KeyState.DECRYPT_ONLY, changed_at=now)
            if key.purpose is purpose and key.state is KeyState.ACTIVE
            else key
            for key in self.keys
        )
        return Keyring([*former, _fresh(purpose)])

    def destroyed(self, key_id: str) -> Keyring:
        """Returns a keyring without the bytes of a decrypt-only key.

        Raises:
            SecurityError: There is no such key, or it is active.
        """
        key = next((key for key in self.keys if key.id == key_id), None)
        if key is None or key.state is not KeyState.DECRYPT_ONLY:
            state = "not in the keyring" if key is None else key.state
            raise SecurityError(
                f"Key {key_id!r} is {state}; only a decrypt-only key can be destroyed, so rotate "
                "first."
            )
        gone = replace(key, state=KeyState.DESTROYED, changed_at=_now(), material=b"")
        return Keyring(gone if k is key else k for k in self.keys)

    def active(self, purpose: Purpose = Purpose.SEAL) -> bytes:
        """Returns the active key of a purpose, 32 bytes.

        Raises:
            MissingKeyError: There is none.
        """
        return self._active(purpose).material

    def active_id(self, purpose: Purpose = Purpose.SEAL) -> str:
        """Returns the id of the active key of a purpose.

        Raises:
            MissingKeyError: There is none.
        """
        return self._active(purpose).id

    def usable(self, key_id: str, purpose: Purpose = Purpose.SEAL) -> bytes | None:
        """Returns a key of a purpose that is not destroyed, or None."""
        own = (key for key in self.keys if key.id == key_id and key.purpose is purpose)
        return next((key.material for key in own if key.material), None)

    def usable_ids(self, purpose: Purpose = Purpose.SEAL) -> tuple[str, ...]:
        """Returns the ids of the keys of a purpose that are not destroyed."""
        return tuple(key.id for key in self.keys if key.purpose is purpose and key.material)

    def usable_keys(self, purpose: Purpose = Purpose.SEAL) -> tuple[bytes, ...]:
        """Returns the keys of a purpose that are not destroyed, oldest first."""
        return tuple(key.material for key in self.keys if key.purpose is purpose and key.material)

    def to_bytes(self) -> bytes:
        """Returns the keyring as JSON, keys included: keep it where only its owner reads."""
        keys = [
            {
                "id": key.id,
                "purpose": key.purpose,
                "state": key.state,
                "created_at": key.created_at,
                "changed_at": key.changed_at,
                "material": base64.b64encode(key.material).decode(),
            }
            for key in self.keys
        ]
        return canonical_json({"schema": SCHEMA, "keys": keys})

    @classmethod
    def from_bytes(cls, data: bytes) -> Keyring:
        """Reads what `to_bytes` wrote.

        Raises:
            SecurityError: It is no keyring. The message never has a part of the content.
        """
        try:
            document = json.loads(data)
            if document["schema"] != SCHEMA:
                raise ValueError(f"schema is not {SCHEMA!r}")
            return cls(_parsed(entry) for entry in document["keys"])
        except (KeyError, TypeError, ValueError, RecursionError, binascii.Error) as error:
            # Not the parser's own message: it may quote the key.
            raise SecurityError(
                f"The keyring cannot be read ({type(error).__name__}); expected JSON of schema "
                f"{SCHEMA!r} as `forge-harness keys new` writes it."
            ) from None

    def _active(self, purpose: Purpose) -> Key:
        for key in self.keys:
            if key.purpose is purpose and key.state is KeyState.ACTIVE:
                return key
        raise MissingKeyError(
            f"The keyring has no active key to {purpose}; add one with `forge-harness keys rotate "
            f"--purpose {purpose}`."
        )


def _fresh(purpose: Purpose) -> Key:
    now = _now()
    return Key(
        os.urandom(_ID_BYTES).hex(), purpose, KeyState.ACTIVE, now, now, os.urandom(KEY_BYTES)
    )


def _parsed(entry: Mapping[str, Any]) -> Key:
    material = base64.b64decode(entry["material"], validate=True)
    state = KeyState(entry["state"])
    if len(material) != (0 if state is KeyState.DESTROYED else KEY_BYTES):
        raise ValueError("length of a key")
    if len(bytes.fromhex(entry["id"])) != _ID_BYTES:
        raise ValueError("length of an id")
    return Key(
        entry["id"],
        Purpose(entry["purpose"]),
        state,
        str(entry["created_at"]),
        str(entry["changed_at"]),
        material,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
