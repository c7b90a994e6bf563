"""JSON objects of checkpoint files, read so that no two readers can take them differently."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from forge_harness.errors import DamagedCheckpointError

from .safetensors_file import MAX_HEADER_BYTES, encodable


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object a file holds.

    Raises:
        DamagedCheckpointError: The file is missing, not UTF-8, not JSON, no object, has a key
            twice or a number JSON does not have. The message names the key or the byte.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_HEADER_BYTES + 1)
    except OSError as error:
        _refuse(path, f"it cannot be read ({error.strerror or error})", error)
    if len(raw) > MAX_HEADER_BYTES:
        _refuse(path, f"it is longer than the {MAX_HEADER_BYTES} bytes allowed")
    return parse_object(raw, path)


def parse_object(raw: bytes, path: Path) -> dict[str, Any]:
    """Returns the JSON object in `raw`; `path` is for the message.

    Raises:
        DamagedCheckpointError: As for `read_object`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                _refuse(path, f"key {key!r} is there twice")
            seen[key] = value
        return seen

    def constant(text: str) -> NoReturn:
        _refuse(path, f"it holds {text}, which is no JSON number")

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            _refuse(path, f"number {text} is beyond float64")
        return value

    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_float=finite,
        )
    except UnicodeDecodeError as error:
        _refuse(path, f"it is not UTF-8 at byte {error.start}", error)
    except json.JSONDecodeError as error:
        byte = len(error.doc[: error.pos].encode())
        _refuse(path, f"it is not JSON at byte {byte}: {error.msg}", error)
    except RecursionError as error:
        _refuse(path, "it nests deeper than any configuration does", error)
    except ValueError as error:  # An integer of thousands of digits.
        _refuse(path, str(error), error)
    return _object(path, value)


def _object(path: Path, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(path, f"it holds {type(value).__name__}, an object was expected")
    if not encodable(value):
        _refuse(path, "it escapes half of a surrogate pair, which is no character")
    return value


def _refuse(path: Path, what: str, cause: Exception | None = None) -> NoReturn:
    raise DamagedCheckpointError(
        f"{path} is damaged: {what}. Get the file again.", path=str(path)
    ) from cause
