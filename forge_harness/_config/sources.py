"""Where configuration values come from: a file found upwards, the environment, flags."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forge_harness.errors import ConfigError
from forge_harness.policy import toml_values

Origin = Literal["flag", "environment", "file", "default"]

CONFIG_NAME = "forge.toml"
PROJECT_NAME = "pyproject.toml"
PROJECT_TABLE = "forge-harness"
ENV_PREFIX = "FORGE_HARNESS_"
ENV_RESERVED = frozenset(
    {
        "FORGE_HARNESS_DEBUG",
        "FORGE_HARNESS_ADVISORIES_FILE",
        "FORGE_HARNESS_STATE_ROOT",
        "FORGE_HARNESS_STATE_AUDIT",
    }
)
"""Variables with the prefix that are not configuration: they change no value a run depends on,
only whether tracebacks are shown, where advisory data are, and what `state` commands work on."""

_BOOLEANS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}
_SEPARATORS = re.compile(r"[-_.]")
_SPELLINGS = ("forgeharness", "bitnetforgeharness")
_INTEGER = re.compile(r"[+-]?[0-9]{1,4000}")


@dataclass(frozen=True, slots=True)
class Given:
    """One value as it was given, and where."""

    value: Any
    origin: Origin
    where: str
    """For messages: `in forge.toml`, `in the environment (FORGE_HARNESS_RUN_SEED)`, `by flag`."""


def find_config_file(start: Path) -> Path | None:
    """Returns the nearest forge.toml, or pyproject.toml with our table, at `start` or above.

    Raises:
        ConfigError: One directory has both, neither of which may win in silence; or what is called
            forge.toml is no file, or a link to nothing.
    """
    for directory in (start, *start.parents):
        own, project = directory / CONFIG_NAME, directory / PROJECT_NAME
        is_own = _is_file(own)
        in_project = project.is_file() and project_table(project) is not None
        if is_own and in_project:
            raise ConfigError(
                f"{directory} has both {CONFIG_NAME} and [tool.{PROJECT_TABLE}] in "
                f"{PROJECT_NAME}; keep one of them, or name one with --config.",
                key=CONFIG_NAME,
            )
        if is_own:
            return own
        if in_project:
            return project
    return None


def _is_file(path: Path) -> bool:
    """Returns whether a file is there; refuses what is meant to be one and cannot be read.

    A link may lead to what a container does not have; to pass it over would be silence.
    """
    if path.is_file():
        return True
    if not os.path.lexists(path):
        return False
    kind = "a link to nothing" if path.is_symlink() and not path.exists() else "no file"
    raise ConfigError(
        f"{path} is {kind}; expected a configuration file: mend or remove it, or name one with "
        "--config.",
        key=path.name,
    )


def read_config_file(path: Path) -> dict[str, Any]:
    """Returns the tables of a configuration file.

    Raises:
        ConfigError: It is missing, is not TOML, or is a pyproject.toml without our table.
    """
    if path.name != PROJECT_NAME:
        return _read_toml(path)
    table = project_table(path)
    if table is None:
        raise ConfigError(
            f"{path} has no [tool.{PROJECT_TABLE}] table; add one, or name a {CONFIG_NAME}.",
            key=str(path),
        )
    return table


def from_file(tables: Mapping[str, Any], name: str) -> Iterator[tuple[str, Given]]:
    """Yields (dotted key, value) of a file; what is not a section comes under its own name."""
    for section, content in tables.items():
        if not isinstance(content, dict):
            yield section, Given(content, "file", f"in {name}")
            continue
        for key, value in content.items():
            yield f"{section}.{key}", Given(value, "file", f"in {name}")


def configuration_variables(environ: Mapping[str, str]) -> list[str]:
    """Returns the names of the variables that are configuration, sorted.

    Those of our prefix in any case: to pass one over that is not in capitals would be silence.
    """
    return sorted(n for n in environ if n.upper().startswith(ENV_PREFIX) and n not in ENV_RESERVED)


def from_environment(
    environ: Mapping[str, str], defaults: Mapping[str, Any], sections: Collection[str]
) -> Iterator[tuple[str, Given]]:
    """Yields (dotted key, value) of every variable with our prefix, known or not.

    Args:
        environ: The environment.
        defaults: Dotted key -> default; its type decides how the text is read.
        sections: Names of the sections.
    """
    known = {ENV_PREFIX + key.replace(".", "_").upper(): key for key in defaults}
    for name in configuration_variables(environ):
        key = known.get(name) or _split_name(name, sections)
        value = parse_text(environ[name], defaults.get(key))
        case = "" if name.isupper() else ", which is not in capitals"
        yield key, Given(value, "environment", f"in the environment ({name}{case})")


def from_flags(
    flags: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[tuple[str, Given]]:
    """Yields (dotted key, value) of the flags that were given; None means not given."""
    for key, value in _flatten(flags):
        if value is None:
            continue
        if isinstance(value, str):
            value = parse_text(value, defaults.get(key))
        elif isinstance(value, Path):
            value = str(value)
        yield key, Given(value, "flag", "given by flag")


def parse_text(text: str, like: object) -> Any:  # noqa: ANN401 - any configuration value
    """Reads text as the type of `like`; text that does not fit comes back as it is.

    The schema then refuses it with the value as the user wrote it. "false" is False, never a
    non-empty string; an empty text is an empty list where a list is wanted.
    """
    stripped = text.strip()
    if isinstance(like, bool):
        return _BOOLEANS.get(stripped.lower(), text)
    if isinstance(like, int):
        return int(stripped) if _INTEGER.fullmatch(stripped) else text
    if isinstance(like, float):
        try:
            return float(stripped) if stripped.isascii() and "_" not in stripped else text
        except ValueError:
            return text
    if isinstance(like, tuple | list):
        return _parse_list(stripped)
    return text


def _parse_list(text: str) -> Any:  # noqa: ANN401 - what JSON holds, judged by the schema
    if text.startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return [part.strip() for part in text.split(",") if part.strip()]


def _split_name(variable: str, sections: Collection[str]) -> str:
    """Returns the dotted key of an unknown variable: a new key of an open section, or a typo.

    One that is not in capitals is a typo too: it and the one that is would name one key.
    """
    rest = variable[len(ENV_PREFIX) :]
    if not variable.isupper():
        return rest
    rest = rest.lower()
    section, _, key = rest.partition("_")
    return f"{section}.{key}" if section in sections and key else rest


def _flatten(flags: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in flags.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def project_table(path: Path) -> dict[str, Any] | None:
    """Returns [tool.forge-harness] of a pyproject.toml, or None where it has none.

    Raises:
        ConfigError: The file is not TOML, or what goes by the name, or one like it, is no table of
            ours.
    """
    tool = _read_toml(path).get("tool", {})
    if not isinstance(tool, dict):
        return None
    _refuse_other_spellings(tool, path)
    if PROJECT_TABLE not in tool:
        return None
    table = tool[PROJECT_TABLE]
    if not isinstance(table, dict):
        raise ConfigError(
            f"tool.{PROJECT_TABLE} is {table!r} in {path}; expected a table "
            f"[tool.{PROJECT_TABLE}].",
            key=f"tool.{PROJECT_TABLE}",
        )
    return table


def _refuse_other_spellings(tool: Mapping[str, Any], path: Path) -> None:
    """The names of the package as it is imported and installed come to mind, and are not read."""
    for name in tool:
        if name != PROJECT_TABLE and _SEPARATORS.sub("", name.lower()) in _SPELLINGS:
            raise ConfigError(
                f"[tool.{name}] in {path} is not read; name it [tool.{PROJECT_TABLE}].",
                key=f"tool.{name}",
            )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return toml_values(path)
    except OSError as error:
        raise ConfigError(
            f"Cannot read configuration file {path}: {error.strerror}.", key=str(path)
        ) from error
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply to be read.", key=str(path)) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.", key=str(path)) from error
