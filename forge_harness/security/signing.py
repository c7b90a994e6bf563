"""Signed packages: every file of a directory, by name and digest, in a signature beside it."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from forge_harness.canonical import file_sha256
from forge_harness.durable import read_plain, write_durably
from forge_harness.errors import SecurityError, SignatureError
from forge_harness.paths import is_utf8, resolved_path

from . import dsse

PREDICATE_TYPE = "urn:forge-harness:package:v1"
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature that is on disk.

    Attributes:
        path: Where.
        files: How many files of the package it is over.
    """

    path: Path
    files: int


@dataclass(frozen=True, slots=True)
class SignedPackage:
    """A package whose signature holds and whose files are the ones that were signed.

    Attributes:
        path: Of the directory.
        files: How many.
        signers: Ids of the pinned keys that signed.
        claim: What the signer said beside the digests.
    """

    path: Path
    files: int
    signers: tuple[str, ...]
    claim: Mapping[str, Any]


def signature_beside(directory: Path) -> Path:
    """Returns where the signature of a package is when nobody said otherwise.

    Raises:
        SecurityError: The directory has nothing beside it.
    """
    named = directory if directory.name not in ("", "..") else resolved_path(directory)
    if not named.name:
        raise SecurityError(f"{str(directory)!r} has no name for a signature beside it; give one.")
    return named.with_name(f"{named.name}.dsse.json")


def check_outside(signature: Path, directory: Path) -> None:
    """Raises unless a signature may be written there.

    Raises:
        SecurityError: It would change what it signs.
    """
    if resolved_path(signature).is_relative_to(resolved_path(directory)):
        raise SecurityError(
            f"The signature {str(signature)!r} would lie within what it signs; put it beside."
        )


def sign_package(
    directory: Path,
    keys: Sequence[bytes],
    *,
    signature: Path | None = None,
    claim: Mapping[str, Any] | None = None,
) -> Signature:
    """Signs every file of a directory; returns once the signature is on disk.

    Args:
        directory: Must not change any more.
        keys: Seeds of Ed25519 keys, 32 bytes each.
        signature: Where to write; None: beside the directory. Never inside: what is signed would
            change.
        claim: JSON values to sign as well.

    Raises:
        SecurityError: There is nothing to sign, something that is no plain file, or no key.
        OSError: The file system refused; an older signature is untouched.
    """
    if not keys:
        raise SecurityError("No signing key is given; expected at least one.")
    target = signature or signature_beside(directory)
    check_outside(target, directory)
    found = digests(directory)
    statement = dsse.Statement(
        found,
        PREDICATE_TYPE,
        {
            "name": resolved_path(directory).name,
            "signed_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "claim": dict(claim or {}),
        },
    )
    private = [Ed25519PrivateKey.from_private_bytes(key) for key in keys]
    write_durably(target, dsse.sign(statement, private))
    return Signature(target, len(found))


def verify_package(
    directory: Path,
    keys: Sequence[Ed25519PublicKey],
    *,
    signature: Path | None = None,
    threshold: int = 1,
) -> SignedPackage:
    """Holds a directory against its signature.

    Args:
        directory: The package.
        keys: Pinned keys; what the signature says of its own key counts for nothing.
        signature: None: beside the directory.
        threshold: How many different pinned keys must have signed.

    Raises:
        SecurityError: There is no such directory.
        SignatureError: The signature is missing or of no pinned key, or a file was changed, added,
            removed, renamed or linked; names the first.
    """
    _check_directory(directory)
    source = signature or signature_beside(directory)
    try:
        # What was not named came with the package: a pipe would be waited for.
        envelope = read_plain(source) if signature is None else source.read_bytes()
    except OSError as error:
        raise SignatureError(
            f"There is no signature {str(source)!r} ({error.strerror}); sign the package, or name "
            "the file with --signature."
        ) from error
    statement, signers = dsse.open_envelope(envelope, keys, threshold=threshold)
    if statement.predicate_type != PREDICATE_TYPE:
        raise SignatureError(
            f"The signature is over a statement of type {statement.predicate_type!r}; expected "
            f"{PREDICATE_TYPE!r}."
        )
    try:
        found = digests(directory)
    except SecurityError as error:
        # Only plain files were signed, so whatever else is there now came later.
        raise SignatureError(f"{str(directory)!r} is not what was signed: {error}") from error
    if differing := _differences(statement.subject, found):
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise SignatureError(
            f"{str(directory)!r} is not what was signed: {'; '.join(differing[:_SHOWN])}{more}. "
            "Get the package again."
        )
    claim = statement.predicate.get("claim")
    return SignedPackage(directory, len(found), signers, claim if isinstance(claim, dict) else {})


def digests(directory: Path) -> dict[str, str]:
    """Returns relative POSIX path -> SHA-256 of every file below a directory.

    Raises:
        SecurityError: It is no directory, is empty, or holds something that is no plain file, or of
            a name that is not UTF-8.
    """
    _check_directory(directory)
    _check_name(resolved_path(directory).name, directory)
    found = {}
    for root, folders, files in os.walk(directory, onerror=_raise):
        for name in [*folders, *files]:
            path = Path(root) / name
            _check_name(name, path)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found[path.relative_to(directory).as_posix()] = file_sha256(path)
            elif not stat.S_ISDIR(mode):
                raise SecurityError(
                    f"{str(path)!r} is a link, device, pipe or socket; a package holds plain files "
                    "only."
                )
    if not found:
        raise SecurityError(f"{str(directory)!r} holds no file; there is nothing to sign.")
    return found


def _check_name(name: str, path: Path) -> None:
    if not is_utf8(name):
        raise SecurityError(
            f"The name of {str(path)!r} is not UTF-8, and what is signed is named in UTF-8; rename "
            "it."
        )


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise SecurityError(f"{str(path)!r} is no directory; expected a package.")


def _raise(error: OSError) -> None:
    raise SecurityError(f"{error.filename!r} cannot be listed ({error.strerror}).") from error


def _differences(signed: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    return [
        f"{name!r} is {_what(signed.get(name), found.get(name))}"
        for name in sorted(signed.keys() | found.keys())
        if signed.get(name) != found.get(name)
    ]


def _what(signed: str | None, found: str | None) -> str:
    if signed is None:
        return "there and was not signed"
    return "missing" if found is None else "changed"
