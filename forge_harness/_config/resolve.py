"""Lays the sources over each other and says, for every value, where it came from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from forge_harness._config.problems import key_problem, unknown_key, value_problems
from forge_harness._config.schema import (
    PATH_KEYS,
    PATH_LIST_KEYS,
    HarnessConfig,
    default_values,
    dotted_values,
)
from forge_harness._config.sources import (
    Given,
    Origin,
    find_config_file,
    from_environment,
    from_file,
    from_flags,
    read_config_file,
)
from forge_harness._config.toml import toml_sections
from forge_harness.canonical import digest_of
from forge_harness.errors import ConfigError
from forge_harness.paths import home_path


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and the origin of each of its values (a `ResolvedConfig`).

    Attributes:
        config: The validated values.
        file: The configuration file that was read, if any.
        given: Dotted key -> the value that won, for every key that is not a default.
    """

    config: HarnessConfig
    file: Path | None
    given: Mapping[str, Given]

    def values(self) -> dict[str, Any]:
        """Returns dotted key -> JSON value, all keys, defaults included."""
        return dotted_values(self.config)

    def origin(self, key: str) -> Origin:
        """Returns which layer a value came from: flag, environment, file or default.

        Raises:
            ConfigError: There is no such key.
        """
        if key not in self.values():
            raise unknown_key(key, "asked for")
        return self.given[key].origin if key in self.given else "default"

    @cached_property
    def digest(self) -> str:
        """`sha256:<hex>` over the values only: formatting, order and origin do not move it."""
        return digest_of(self.values())

    def to_toml(self, *, absolute: bool = False) -> str:
        """Returns a forge.toml that loads back to the same values.

        Args:
            absolute: Make paths absolute, for a file that lies in another directory.
        """
        values = self.values()
        if absolute:
            values |= {key: str(self.path(key) or "") for key in PATH_KEYS}
            values |= {key: [str(path) for path in self.paths(key)] for key in PATH_LIST_KEYS}
        return toml_sections(values)

    def path(self, key: str) -> Path | None:
        """Returns a path value made absolute, or None where it is empty.

        A path in the file is relative to the file, any other to the current directory.
        """
        text = self.values()[key]
        return self._absolute(key, text) if text else None

    def paths(self, key: str) -> tuple[Path, ...]:
        """Returns a list of paths made absolute, as `path` does."""
        return tuple(self._absolute(key, text) for text in self.values()[key])

    def suite_paths(self) -> tuple[Path, ...]:
        """Returns run.suite_paths made absolute, as `path` does."""
        return self.paths("run.suite_paths")

    @property
    def subject(self) -> str:
        """run.subject, to be loaded from the current directory; "" for the reference pipeline.

        A path in the file is relative to the file. It stays relative, as it names the subject in
        runs and baselines of other machines too.
        """
        text = self.config.run.subject
        location, colon, attribute = text.rpartition(":")
        for path, rest in ((text, ""), (location, colon + attribute)):
            found = self._absolute("run.subject", path) if path else None
            if found is not None and found != Path(path).absolute() and found.exists():
                return os.path.relpath(found) + rest
        return text

    def _absolute(self, key: str, text: str) -> Path:
        beside_file = self.file is not None and self.origin(key) == "file"
        base = self.file.parent if self.file is not None and beside_file else Path()
        return (base / home_path(text)).absolute()


def load_config(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    cwd: Path | None = None,
) -> LoadedConfig:
    """Loads the configuration: flags over environment over file over defaults.

    An explicit 0, false, "" or [] is a value like any other, in every layer.

    Args:
        file: forge.toml, or a pyproject.toml with [tool.forge-harness]. None looks for one in
            `cwd` and the directories above.
        environ: Variables `FORGE_HARNESS_<SECTION>_<KEY>`; the process's own when None.
        flags: Dotted key -> value; None values are flags that were not given.
        cwd: Where the search for the file starts; the current directory when None.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type or is out of range. The
            sentence names the first problem and counts the others.
    """
    loaded, problems = resolve(file, environ, flags, cwd)
    if loaded is None:
        first = problems[0]
        if len(problems) == 1:
            raise first
        more = f" ({len(problems) - 1} more: `forge-harness config check` lists all.)"
        raise ConfigError(f"{first}{more}", key=first.key, suggestion=first.suggestion)
    return loaded


def resolve(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    cwd: Path | None = None,
) -> tuple[LoadedConfig | None, list[ConfigError]]:
    """Returns the configuration, or None and every problem in it (see `load_config`)."""
    path = file if file is not None else find_config_file((cwd or Path.cwd()).absolute())
    layers: list[tuple[str, Given]] = []
    if path is not None:
        layers += from_file(read_config_file(path), str(file) if file is not None else path.name)
    defaults = default_values()
    layers += from_environment(
        os.environ if environ is None else environ, defaults, HarnessConfig.model_fields
    )
    layers += from_flags(flags or {}, defaults)
    problems: list[ConfigError] = []
    given: dict[str, Given] = {}
    for key, entry in layers:
        if problem := key_problem(key, entry):
            problems.append(problem)
        else:
            given[key] = entry
    try:
        config = HarnessConfig.model_validate(_nested(given))
    except ValidationError as error:
        return None, problems + value_problems(error, given)
    return (None, problems) if problems else (LoadedConfig(config, path, given), [])


def _nested(given: Mapping[str, Given]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for dotted, entry in given.items():
        section, _, key = dotted.partition(".")
        tables.setdefault(section, {})[key] = entry.value
    return tables
