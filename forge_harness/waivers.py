"""The waiver ledger: known failures someone owns, until a date."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from forge_harness.errors import ConfigError, unknown_choice
from forge_harness.policy import read_toml, rows_of
from forge_harness.record import Waiver


def load_waivers(file: Path) -> list[Waiver]:
    """Reads a waiver file: TOML with `[[waiver]]` tables of check, owner, reason, issue, expires.

    Raises:
        ConfigError: The file is missing, is not TOML, or a waiver lacks a field: a waiver
            nobody owns, or that never ends, is none.
    """
    tables = read_toml(file)
    for key in tables:
        if key != "waiver":
            raise ConfigError(f"{file}: " + unknown_choice("table", key, ["waiver"]), key=key)
    rows = rows_of(file, tables, "waiver")
    return [_waiver(f"{file}: waiver {index}", row) for index, row in enumerate(rows, 1)]


def _waiver(where: str, row: dict[str, Any]) -> Waiver:
    values = {k: v.isoformat() if isinstance(v, date) else v for k, v in row.items()}
    for key, value in values.items():
        if key not in Waiver.model_fields:
            choices = unknown_choice("key", key, Waiver.model_fields)
            raise ConfigError(f"{where}: {choices}", key=key)
        # Here and not in the record's schema: what an earlier release recorded must still verify.
        if isinstance(value, str) and not value.strip():
            raise ConfigError(f"{where}: {key} is empty; expected text.", key=key)
    if "expires" in values and not _is_day(values["expires"]):
        raise ConfigError(
            f"{where}: expires is {values['expires']!r}; expected a day such as 2026-12-31.",
            key="expires",
        )
    try:
        return Waiver.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {key}: {first['msg']}.", key=key) from error


def _is_day(value: object) -> bool:
    """Whether a value is a day as text compares it: 20261231 is one day and another text."""
    try:
        return isinstance(value, str) and date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False
