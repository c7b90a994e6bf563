"""`forge-harness init`: a configuration, an example check, a CI workflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from forge_harness.cli.options import examples
from forge_harness.errors import RunDirectoryError, UsageError

CHECK_PATH = "forge_checks/test_example.py"
WORKFLOW_PATH = ".github/workflows/forge.yml"

EXAMPLE_CHECK = '''\
"""A check of your own. `forge-harness run` picks it up (run.suite_paths) and scores it."""

import pytest


@pytest.mark.forge_check("mine.loss_falls", title="The loss falls", severity="high")
def test_loss_falls(evidence):
    losses = [2.0, 1.1, 0.6]  # replace by the losses of a short training run
    evidence.at_most(
        "loss_ratio", losses[-1] / losses[0], limit=0.5, reason="halves in three steps"
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
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: { python-version: "3.11" }
      - run: pip install bitnet-forge-harness --extra-index-url https://download.pytorch.org/whl/cpu
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
@click.argument("directory", metavar="[DIR]", default=".", type=click.Path(path_type=Path))
def init_command(directory: Path) -> None:
    """Write forge.toml, an example check and a GitHub Actions workflow into DIR.

    Refuses to overwrite: when one of the files exists, none is written.
    """
    from forge_harness.config import CONFIG_NAME, commented_toml

    files = {
        CONFIG_NAME: commented_toml({"run.suite_paths": [str(Path(CHECK_PATH).parent)]}),
        CHECK_PATH: EXAMPLE_CHECK,
        WORKFLOW_PATH: WORKFLOW,
    }
    taken = [name for name in files if (directory / name).exists()]
    if taken:
        raise UsageError(
            f"Refusing to overwrite {', '.join(str(directory / name) for name in taken)}; nothing "
            "was written. Move it away, or name another directory."
        )
    for path in write_all(directory, files):
        click.echo(path)
    click.echo("Next: forge-harness doctor, then forge-harness run")


def write_all(directory: Path, files: Mapping[str, str]) -> list[Path]:
    """Writes files under a directory; never over an existing one.

    Raises:
        RunDirectoryError: One cannot be written.
    """
    written = []
    for name, text in files.items():
        path = directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
        except OSError as error:
            raise RunDirectoryError(f"Cannot write {path}: {error.strerror}.") from error
        written.append(path)
    return written
