"""`forge-harness init`: a configuration, an example check, a CI workflow."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import click

from forge_harness.cli.options import NamedPath, examples
from forge_harness.errors import RunDirectoryError, UsageError

CHECK_PATH = "forge_checks/test_example.py"
WORKFLOW_PATH = ".github/workflows/forge.yml"

EXAMPLE_CHECK = '''\
"""A check of your own. `forge-harness run` picks it up (run.suite_paths) and scores it."""

import pytest


@pytest.mark.forge_check("mine.fits_flash", title="The model fits the flash chip", severity="high")
def test_fits_flash(subject, evidence):
    spec = subject.model_spec(subject.tasks()[0])
    evidence.at_most(
        "parameters",
        spec.parameters,
        limit=500_000,  # replace by what your device holds
        unit="parameters",
        reason="1 MiB of flash at 2 bits a weight",
    )
'''

WORKFLOW = """\
# Measures in one job and gates in another: a skipped required check counts as success on GitHub,
# so the gate always runs and fails when the run is missing, unfinished or damaged.
name: forge

on: [push, pull_request]

permissions:
  contents: read

jobs:
  validate:
    runs-on: ubuntu-24.04
    env:
      # This runner has none. Without the line, checks of an accelerator are not measured: exit 7.
      FORGE_HARNESS_DECLARED_ACCELERATOR: none
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: { python-version: "3.11" }
      # What some checks call; without it they are not measured.
      - run: sudo apt-get update -qq && sudo apt-get install -y -qq strace
      - run: >-
          pip install 'bitnet-forge-harness[checks]'
          --extra-index-url https://download.pytorch.org/whl/cpu
      # And your own package, once forge.toml names your subject:
      # - run: pip install .
      - run: forge-harness doctor || true
      # `run` measures; its exit code is the gate's business.
      - run: forge-harness run --run-dir forge-run || true
      - uses: actions/upload-artifact@v4
        if: always()
        with: { name: forge-run, path: forge-run, if-no-files-found: error }

  gate:
    if: always()
    needs: validate
    runs-on: ubuntu-24.04
    steps:
      - uses: actions/setup-python@v5
        with: { python-version: "3.11" }
      - uses: actions/download-artifact@v4
        with: { name: forge-run, path: forge-run }
      - run: pip install bitnet-forge-harness --extra-index-url https://download.pytorch.org/whl/cpu
      # 1: a gate failed. 7: something required was not measured. 8: the run was tampered with.
      - run: forge-harness gate forge-run
"""


@click.command(
    "init", epilog=examples("forge-harness init", "forge-harness init path/to/my_project")
)
@click.argument("directory", metavar="[DIR]", default=".", type=NamedPath())
def init_command(directory: Path) -> None:
    """Write forge.toml, an example check and a GitHub Actions workflow into DIR.

    Refuses to overwrite: when one of the files exists, or one cannot be written, none is.
    """
    from forge_harness.config import CONFIG_NAME, commented_toml

    files = {
        CONFIG_NAME: commented_toml({"run.suite_paths": [str(Path(CHECK_PATH).parent)]}),
        CHECK_PATH: EXAMPLE_CHECK,
        WORKFLOW_PATH: WORKFLOW,
    }
    check_all(directory, files)
    for path in write_all(directory, files):
        click.echo(path)
    click.echo("Next: forge-harness doctor, then forge-harness run")


def check_all(directory: Path, names: Iterable[str]) -> None:
    """Refuses a directory that files cannot all be written to, before one is.

    Raises:
        UsageError: A file exists, or lies where a directory must be.
        ConfigError: The directory is configured by its pyproject.toml already, or that is broken.
    """
    from forge_harness.config import project_table

    # A link that leads nowhere is in the way too.
    taken = [directory / name for name in names if os.path.lexists(directory / name)]
    if taken:
        raise UsageError(
            f"Refusing to overwrite {', '.join(map(str, taken))}; nothing was written. Move it "
            "away, or name another directory."
        )
    for path in (directory / name for name in names):
        above = next((parent for parent in path.parents if os.path.lexists(parent)), None)
        if above is not None and not above.is_dir():
            raise UsageError(
                f"Cannot write {path}: {above} is a file; expected a directory, or nothing; "
                "nothing was written. Move it away, or name another directory."
            )
    project = directory / "pyproject.toml"
    if project.is_file() and project_table(project) is not None:
        raise UsageError(
            f"{project} has [tool.forge-harness], which a forge.toml beside it would contradict; "
            "nothing was written. Remove the table, or name another directory."
        )


def write_all(directory: Path, files: Mapping[str, str]) -> list[Path]:
    """Writes files under a directory; all of them or none, and never over an existing one.

    Raises:
        RunDirectoryError: One cannot be written.
    """
    made: list[Path] = []
    written: list[Path] = []
    for name, text in files.items():
        path = directory / name
        try:
            missing = [parent for parent in path.parents if not parent.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            made = [*missing, *made]
            with path.open("x", encoding="utf-8", newline="\n") as stream:
                written.append(path)
                stream.write(text)
        except OSError as error:
            _undo(written, made)
            raise RunDirectoryError(
                f"Cannot write {path}: {error.strerror}; nothing was written. Name another "
                "directory."
            ) from error
    return written


def _undo(files: Iterable[Path], directories: Iterable[Path]) -> None:
    """Removes what a failed `write_all` made, so that a second try does not meet it."""
    for path in files:
        with contextlib.suppress(OSError):
            path.unlink()
    for path in directories:
        with contextlib.suppress(OSError):
            path.rmdir()
