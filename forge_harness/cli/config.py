"""`forge-harness config`: show, check, schema."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.options import config_option, examples, json_option, load
from forge_harness.cli.terminal import echo_json, table
from forge_harness.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from forge_harness.config import LoadedConfig


@click.group("config", epilog=examples("forge-harness config show --origin"))
def config_group() -> None:
    """Show or check the configuration, print its schema."""


@config_group.command(epilog=examples("forge-harness config show --origin"))
@config_option
@click.option("--origin", is_flag=True, help="Show where each value came from.")
@json_option
def show(config_file: Path | None, origin: bool, as_json: bool) -> None:
    """Print the configuration in force, as a forge.toml or as JSON."""
    loaded = load(config_file)
    if as_json:
        values = loaded.values()
        rows = {key: {"value": v, "origin": loaded.origin(key)} for key, v in values.items()}
        document = rows if origin else values
        echo_json({"digest": loaded.digest, "file": _file(loaded), "values": document})
    elif origin:
        click.echo(_origins(loaded))
    else:
        click.echo(loaded.to_toml(), nl=False)


def _file(loaded: LoadedConfig) -> str | None:
    return None if loaded.file is None else str(loaded.file)


def _origins(loaded: LoadedConfig) -> str:
    from forge_harness._config.toml import toml_value

    rows = []
    for key, value in loaded.values().items():
        given = loaded.given.get(key)
        where = "" if given is None else given.where
        rows.append((key, toml_value(value), loaded.origin(key), where))
    return table(("key", "value", "origin", "where"), rows) + f"\n\ndigest {loaded.digest}"


@config_group.command(epilog=examples("forge-harness config check --config forge.toml"))
@config_option
def check(config_file: Path | None) -> int:
    """Exit 0 when the configuration is valid, else 4 with every problem."""
    from forge_harness.config import resolve

    loaded, problems = resolve(file=config_file)
    if loaded is None:
        for problem in problems:
            click.echo(f"Error: {problem}", err=True)
        return ExitCode.USAGE
    missing = _missing_paths(loaded)
    for problem in missing:
        click.echo(f"Error: {problem}", err=True)
    if missing:
        return ExitCode.USAGE
    source = loaded.file or "no file, environment and defaults only"
    click.echo(f"The configuration is valid ({source}; digest {loaded.digest}).")
    return ExitCode.PASS


def _missing_paths(loaded: LoadedConfig) -> list[ConfigError]:
    named = {key: loaded.path(key) for key in ("run.policy", "run.waivers")}
    pairs = [(key, path) for key, path in named.items() if path is not None]
    pairs += [("run.suite_paths", path) for path in loaded.suite_paths()]
    return [
        ConfigError(f"{key} names {path}, which does not exist.", key=key)
        for key, path in pairs
        if not path.exists()
    ]


@config_group.command(epilog=examples("forge-harness config schema > forge-toml.schema.json"))
def schema() -> None:
    """Print the JSON Schema of forge.toml, for editors and validators."""
    from forge_harness.config import config_json_schema

    echo_json(config_json_schema())
