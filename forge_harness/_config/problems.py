"""Says what is wrong with a configuration: the value, where it came from, what was expected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError

from forge_harness._config.schema import (
    DECLARED_DEFAULTS,
    PATH_KEYS,
    PATH_LIST_KEYS,
    HarnessConfig,
    config_json_schema,
    default_values,
)
from forge_harness._config.sources import Given
from forge_harness.errors import ConfigError, nearest

OPEN_SECTIONS = frozenset({"declared"})
"""Sections that take keys of the user's own."""
_PATHS = frozenset({*PATH_KEYS, *PATH_LIST_KEYS, "run.subject"})
"""Keys whose text is given to the file system, which takes no NUL."""
_LONGEST_SHOWN = 200


def _cut(value: object) -> str:
    """Returns a value as a sentence shows it: whole unless it is longer than one."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def key_problem(key: str, given: Given) -> ConfigError | None:
    """Returns what is wrong with a dotted key, whatever its value, or None."""
    section, dot, name = key.partition(".")
    if not dot and section in HarnessConfig.model_fields:
        sentence = f"{section} is {_cut(given.value)} {given.where}; expected a table [{section}]."
        return ConfigError(sentence, key=key)
    texts = [text for text in _items(given.value) if isinstance(text, str)]
    if not all(map(_is_unicode, texts)):
        sentence = f"{key} is {_cut(given.value)} {given.where}; expected text in UTF-8."
        return ConfigError(sentence, key=key)
    if key in _PATHS and any("\0" in text for text in texts):
        sentence = f"{key} is {_cut(given.value)} {given.where}; expected text without NUL, as in "
        return ConfigError(f"{sentence}any path.", key=key)
    if key in default_values():
        return None
    # A declared key nobody reads is fine, but a misspelt one would rule nothing out in silence.
    if section in OPEN_SECTIONS and name and nearest(name, DECLARED_DEFAULTS) is None:
        return None
    return unknown_key(key, given.where)


def _items(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_unicode(text: str) -> bool:
    """Whether text has no bytes smuggled in by surrogateescape, which no file could hold."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def unknown_key(key: str, where: str) -> ConfigError:
    """Returns the error for a key that does not exist, with the nearest that does."""
    known = list(default_values())
    section = key.partition(".")[0]
    siblings = [entry.partition(".")[2] for entry in known if entry.startswith(f"{section}.")]
    close = _nearest_key(key, known)
    hint = f" Did you mean {close!r}?" if close else ""
    if siblings:
        valid = f"Valid in [{section}]: {', '.join(sorted(siblings))}."
    else:
        valid = f"Sections: {', '.join(sorted(HarnessConfig.model_fields))}."
    return ConfigError(f"Unknown key {key!r} {where}.{hint} {valid}", key=key, suggestion=close)


def _nearest_key(key: str, known: list[str]) -> str | None:
    """Returns the closest key: in the same section, of the same name elsewhere, or a section."""
    section, _, name = key.partition(".")
    siblings = {k.partition(".")[2]: k for k in known if k.startswith(f"{section}.")}
    if same := _same_name(name or section, known):
        return same
    if siblings:
        return siblings.get(nearest(name, siblings) or "")
    if close := nearest(key, known):
        return close
    return nearest(section, HarnessConfig.model_fields)


def _same_name(name: str, known: Iterable[str]) -> str | None:
    return next((key for key in known if key.partition(".")[2] == name), None)


def value_problems(error: ValidationError, given: Mapping[str, Given]) -> list[ConfigError]:
    """Returns one error a value that the schema refused."""
    problems = []
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"][:2])
        context = detail.get("ctx", {})
        if detail["type"] == "rule":
            key = f"{key}.{context['key']}"
            problems.append(_value_problem(key, context["value"], context["expected"], given))
        else:
            problems.append(_value_problem(key, detail["input"], expected(key), given))
    return problems


def _value_problem(key: str, value: object, wanted: str, given: Mapping[str, Given]) -> ConfigError:
    if key in given:
        value, where = given[key].value, given[key].where
    else:
        where = "by default"
    choices = _property(key).get("enum", [])
    close = nearest(value, choices) if isinstance(value, str) else None
    hint = f" Did you mean {close!r}?" if close else ""
    sentence = f"{key} is {_cut(value)} {where}; expected {wanted}.{hint}"
    return ConfigError(sentence, key=key, suggestion=close)


def expected(key: str) -> str:
    """Returns in words what a key takes, bounds included."""
    field = _property(key)
    if "enum" in field:
        return "one of " + ", ".join(repr(choice) for choice in sorted(field["enum"]))
    kind = field.get("type")
    if kind == "array":
        return "a list of text"
    if kind == "boolean":
        return "true or false"
    if kind == "string":
        return "text that is not empty" if field.get("minLength") else "text"
    noun = "an integer" if kind == "integer" else "a finite number"
    return f"{noun} {_bounds(field)}".strip()


def _bounds(field: Mapping[str, Any]) -> str:
    low, over, high = (field.get(k) for k in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None and high is not None:
        return f"from {low} to {high}"
    if low is not None:
        return f"of at least {low}"
    if over is not None and high is not None:
        return f"above {over} and at most {high}"
    return ""


@cache
def _schema() -> dict[str, Any]:
    return config_json_schema()


def _property(key: str) -> dict[str, Any]:
    """Returns the JSON Schema of one key, references resolved."""
    section, _, name = key.partition(".")
    table = _resolve(_schema()["properties"].get(section, {}))
    other = {"type": "string"} if section in OPEN_SECTIONS else {}
    return _resolve(table.get("properties", {}).get(name, other))


def _resolve(node: dict[str, Any]) -> dict[str, Any]:
    reference = node.get("$ref")
    if reference is None:
        return node
    definition: dict[str, Any] = _schema()["$defs"][reference.rpartition("/")[2]]
    return definition
