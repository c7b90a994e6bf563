"""`forge-harness merge`: one run from the runs of several CI jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.gate import admitted
from forge_harness.cli.options import NamedPath, examples
from forge_harness.cli.run import DEFAULT_FORMATS, parse_formats

if TYPE_CHECKING:
    from forge_harness.policy import Policy
    from forge_harness.record import RunRecord

_DIRECTORY = NamedPath()


@click.command(
    "merge",
    epilog=examples(
        "forge-harness merge shard-1 shard-2 shard-3 --run-dir whole", "forge-harness gate whole"
    ),
)
@click.argument("directories", metavar="DIR...", nargs=-1, required=True, type=_DIRECTORY)
@click.option(
    "--run-dir", "out", metavar="DIR", required=True, type=_DIRECTORY, help="New or empty."
)
@click.option(
    "--format",
    "formats",
    default=DEFAULT_FORMATS,
    show_default=True,
    callback=parse_formats,
    help="Reports to write: html, json, md, junit, ctrf, sarif.",
)
def merge_command(directories: tuple[Path, ...], out: Path, formats: tuple[str, ...]) -> int:
    """Make one run over the whole profile from the shards in DIR... (`run --shard I/N`).

    Each must verify, and all must be of one commit, installation, subject, policy, profile and
    seed; the machines may differ. A check that no shard ran is not measured, of one that several
    ran the worse outcome counts. The exit code is that of `run`.
    """
    from forge_harness.cli.summary import summary
    from forge_harness.cli.terminal import say
    from forge_harness.integration.stops import uninterrupted
    from forge_harness.merging import merge_runs
    from forge_harness.scoring import exit_code_for
    from forge_harness.scoring.merge import missing_shards

    sources, policy = _read(directories)
    with uninterrupted():
        record, written = merge_runs(sources, policy, out, formats)
    code = exit_code_for(record)
    click.echo(summary(record, policy, out, written, code))
    if missing := missing_shards(record):
        say(f"Not given: shard {', '.join(missing)}. What it measures is not measured here.")
    return code


def _read(directories: tuple[Path, ...]) -> tuple[list[tuple[Path, RunRecord]], Policy]:
    admitted_runs = [(path, *admitted(path)) for path in directories]
    return [(path, record) for path, record, _ in admitted_runs], admitted_runs[0][2]
