"""What the checks read off a configuration schema, so that no key name is written into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MISSING = object()


@dataclass(frozen=True, slots=True)
class Key:
    """One scalar or list key of a configuration, as its schema describes it."""

    name: str
    """Dotted: section.key, as deep as tables are; a key of no table has no dot."""
    kind: str
    """JSON Schema type: integer, number, string, boolean, array."""
    low: float | None
    """Smallest allowed value, or None without a lower bound."""
    low_is_allowed: bool
    high: float | None
    high_is_allowed: bool
    choices: tuple[Any, ...]
    min_length: int

    @property
    def section(self) -> str:
        """The table the key is in; empty for one of no table."""
        return self.name.rpartition(".")[0]

    @property
    def last(self) -> str:
        """The key without its table."""
        return self.name.rpartition(".")[2]

    def falsy(self) -> Any:
        """Returns the falsy value that is legal by the schema, or MISSING."""
        if self.choices:
            return MISSING
        if self.kind in ("integer", "number"):
            above = self.low is None or self.low < 0 or (self.low == 0 and self.low_is_allowed)
            below = self.high is None or self.high >= 0
            return (0 if self.kind == "integer" else 0.0) if above and below else MISSING
        legal = {"boolean": False, "string": "", "array": []}
        return MISSING if self.min_length else legal.get(self.kind, MISSING)

    def candidates(self) -> list[Any]:
        """Returns values that are legal by the schema, most distinct first."""
        if self.choices:
            return list(self.choices)
        if self.kind == "boolean":
            return [True, False]
        if self.kind == "string":
            return ["one", "two", "three"]
        if self.kind == "array":
            return [["one"], ["two"], ["three"]]
        start = 1 if self.low is None else self.low
        steps = [start + i for i in (1, 2, 3, 4, 8, 12, 16)]
        if self.kind == "number":
            top = 1.0 if self.high is None else min(self.high, 1.0)
            # Thirds and sevenths: writing them in few digits changes them.
            steps = [top / 7, top / 6, top / 3]
        return [s for s in steps if self.high is None or s <= self.high]


def keys_of(schema: Mapping[str, Any]) -> list[Key]:
    """Returns every key of a schema, of the file itself and of tables in tables.

    A table that takes any key is a key of kind object, and so is one within a table of its kind:
    such tables have no end.
    """
    return list(_keys(schema, schema, "", ()))


def _keys(
    table: Mapping[str, Any], schema: Mapping[str, Any], prefix: str, around: tuple[Any, ...]
) -> Iterator[Key]:
    properties = table.get("properties", {})
    around = (*around, properties)
    for name, node in properties.items():
        field = _resolve(node, schema)
        if "properties" not in field:
            yield _key(f"{prefix}{name}", field)
        elif any(field["properties"] is known for known in around):
            yield _key(f"{prefix}{name}", {**field, "type": "object"})
        else:
            yield from _keys(field, schema, f"{prefix}{name}.", around)


def _resolve(node: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a node with what it refers to; of one that may be null, what else it may be."""
    merged = dict(node)
    for part in [node.get("$ref"), *(p.get("$ref") for p in node.get("allOf", []))]:
        if isinstance(part, str) and part.startswith("#/$defs/"):
            merged = {**schema["$defs"][part.removeprefix("#/$defs/")], **merged}
    kinds = merged.get("type")
    if isinstance(kinds, list) and len(named := [kind for kind in kinds if kind != "null"]) == 1:
        merged["type"] = named[0]
    choices = [c for c in merged.get("anyOf", merged.get("oneOf", ())) if c.get("type") != "null"]
    return {**_resolve(choices[0], schema), **merged} if len(choices) == 1 else merged


def _key(name: str, field: Mapping[str, Any]) -> Key:
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    return Key(
        name=name,
        kind=str(field.get("type", "unknown")),
        low=low,
        low_is_allowed="minimum" in field,
        high=high,
        high_is_allowed="maximum" in field,
        choices=tuple(choice for choice in field.get("enum", ()) if choice is not None),
        min_length=int(field.get("minLength", 0)),
    )


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns dotted keys as tables."""
    tables: dict[str, Any] = {}
    for name, value in values.items():
        *path, key = name.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
        table[key] = value
    return tables


def write_toml(path: Path, values: Mapping[str, Any]) -> Path:
    """Writes dotted keys as a TOML file, by hand: no code is shared with what reads it."""
    tables: dict[str, list[str]] = {"": []}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        tables.setdefault(section, []).append(f"{key} = {literal(value)}")
    lines = [
        line
        for section, entries in tables.items()
        for line in (*([f"[{section}]"] if section else []), *entries)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def literal(value: Any) -> str:
    """Returns a TOML literal of a scalar or list."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(literal(entry) for entry in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)


def variable(subject: object, key: Key) -> str:
    """Returns the environment variable of a key: PREFIX_SECTION_KEY."""
    prefix = getattr(subject, "environment_prefix", "FORGE_HARNESS_")
    return f"{prefix}{key.name.replace('.', '_')}".upper()


class Isolated:
    """Loads a subject's configuration from the layers given and nothing else.

    Without a file the subject would look for the project's own, and what it sets would take part
    in every load: an empty file is given instead.
    """

    def __init__(self, subject: Any, empty: Path) -> None:
        empty.write_text("", encoding="utf-8")
        self.subject = subject
        self.empty = empty

    def load(
        self,
        *,
        file: Path | None = None,
        environ: Mapping[str, str] | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> Any:
        """Returns the configuration of these layers."""
        return self.subject.load_config(
            file=self.empty if file is None else file, environ=environ or {}, flags=flags or {}
        )

    def refusal(self, **layers: Any) -> Exception | None:
        """Returns the error a load is refused with, or None when it is accepted."""
        try:
            self.load(**layers)
        except Exception as error:
            return error
        return None

    def defaults(self) -> Mapping[str, Any]:
        """Returns the values no layer sets."""
        values: Mapping[str, Any] = self.load().values()
        return values

    def settable(self, keys: list[Key], count: int) -> Iterator[tuple[Key, list[Any]]]:
        """Yields keys for which `count` distinct values load on their own, with those values.

        What rules tie to other keys (a divisor, a smaller number) drops out by itself.
        """
        for key in keys:
            legal = [v for v in key.candidates() if self.refusal(flags={key.name: v}) is None]
            if len(legal) >= count:
                yield key, legal[:count]


def same(first: Any, second: Any) -> bool:
    """Returns whether two values are equal and of one type: 1, 1.0 and True differ."""
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second
