"""Writes TOML: the values in force, and the commented starting file of `init`."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def toml_value(value: Any) -> str:  # noqa: ANN401 - text, number, boolean or list of text
    """Returns a value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, except that TOML also escapes DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return repr(value)


def toml_key(key: str) -> str:
    """Returns a key as TOML, quoted where it must be."""
    return key if _BARE_KEY.fullmatch(key) else toml_value(key)


def toml_sections(values: Mapping[str, Any]) -> str:
    """Returns dotted keys and values as TOML tables, one a section."""
    sections: dict[str, list[str]] = {}
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        sections.setdefault(section, []).append(f"{toml_key(key)} = {toml_value(value)}")
    blocks = [f"[{name}]\n" + "\n".join(lines) + "\n" for name, lines in sections.items()]
    return "\n".join(blocks)


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a commented file."""

    key: str
    value: Any
    description: str
    is_set: bool
    """Whether the line counts, or is a comment."""


def commented_section(name: str, about: str, entries: Iterable[Entry]) -> str:
    """Returns a section with the description over each key, and one sentence over the section."""
    lines = [*_comment(about), f"[{name}]"]
    for entry in entries:
        mark = "" if entry.is_set else "# "
        line = f"{mark}{toml_key(entry.key)} = {toml_value(entry.value)}"
        lines += [*_comment(entry.description), line]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 96, initial_indent="# ", subsequent_indent="# ")
