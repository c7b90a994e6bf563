"""Canonical JSON (RFC 8785) and the digests made from it."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NoReturn

import rfc8785

_CHUNK_BYTES = 1 << 20
_SAFE_INTEGER = 2**53 - 1


def canonical_json(value: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """Returns the one byte string RFC 8785 allows for a JSON value.

    Raises:
        ValueError: For non-finite floats and integers beyond 2**53 - 1, which JSON readers
            do not agree on.
    """
    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        raise ValueError(f"not representable in canonical JSON: {error}") from error


def read_canonical(data: bytes | str) -> Any:  # noqa: ANN401 - any JSON value
    """Returns the value that `canonical_json` wrote, with the floats that went in.

    Whole floats are written without a point: a reader that takes 1e16 for an integer could not
    write it again, and one that takes 1.2345678901234567e20 for one has another number.

    Nothing is read that two readers could take differently.

    Raises:
        ValueError: It is not JSON in UTF-8, has a key twice, or a number that JSON or float64 does
            not have.
        RecursionError: It is nested too deeply.
    """
    return json.loads(
        data if isinstance(data, str) else data.decode("utf-8"),
        parse_int=_number,
        parse_float=_finite,
        parse_constant=_refused,
        object_pairs_hook=_unique,
    )


def read_strict(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """Returns the value of a JSON text, without what Python's reader takes beyond JSON.

    Raises:
        ValueError: It is no JSON, has a key twice, or NaN or an infinity.
        RecursionError: It is nested too deeply.
    """
    return _STRICT.decode(text)


def json_fault(error: ValueError | RecursionError) -> str:
    """Returns why a text could not be read as JSON, as a clause for the person who gave it.

    Args:
        error: What `read_canonical` or `read_strict` raised.
    """
    if isinstance(error, json.JSONDecodeError):
        if not error.doc.strip():
            return "it is empty"
        return f"from line {error.lineno}, column {error.colno} on it cannot be read as JSON"
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _number(text: str) -> int | float:
    value = int(text)
    return value if abs(value) <= _SAFE_INTEGER else _finite(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text} is beyond float64")
    return value


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key!r} is there twice")
        values[key] = value
    return values


# Made once: json.loads with arguments makes one every time.
_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refused)


def sha256_hex(data: bytes) -> str:
    """Returns the lower-case hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def digest_of(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Returns `sha256:<hex>` of the canonical JSON of `value`."""
    return f"sha256:{sha256_hex(canonical_json(value))}"


def file_sha256(path: Path) -> str:
    """Returns the lower-case hexadecimal SHA-256 of a file, read in 1 MiB chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def tree_digest(path: Path) -> str:
    """Returns `sha256:<hex>` over names and content of a file, or of all files of a directory."""
    if path.is_file():
        return f"sha256:{file_sha256(path)}"
    files = sorted(entry for entry in path.rglob("*") if entry.is_file())
    return digest_of({str(entry.relative_to(path)): file_sha256(entry) for entry in files})
