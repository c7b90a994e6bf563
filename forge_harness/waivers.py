"""The waiver ledger: known failures someone owns, until a date."""

from __future__ import annotations

import tomllib
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from forge_harness.errors import ConfigError, unknown_choice
from forge_harness.record import Waiver


def load_waivers(file: Path) -> list[Waiver]:
    """Reads a waiver file: TOML with `[[waiver]]` tables of check, owner, reason, issue, expires.

    Raises:
        ConfigError: The file is missing, is not TOML, or a waiver lacks a field: a waiver
            nobody owns, or that never ends, is none.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read {file}: {error.strerror}.", key=str(file)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}.", key=str(file)) from error
    for key in tables:
        if key != "waiver":
            raise ConfigError(f"{file}: " + unknown_choice("table", key, ["waiver"]), key=key)
    return [_waiver(file, index, row) for index, row in enumerate(tables.get("waiver", []), 1)]


def _waiver(file: Path, index: int, row: dict[str, Any]) -> Waiver:
    values = {k: v.isoformat() if isinstance(v, date) else v for k, v in row.items()}
    try:
        waiver = Waiver.model_validate(values)
        date.fromisoformat(waiver.expires)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{file}: waiver {index}: {key}: {first['msg']}.", key=key) from error
    except ValueError as error:
        raise ConfigError(f"{file}: waiver {index}: expires: {error}.", key="expires") from error
    return waiver
