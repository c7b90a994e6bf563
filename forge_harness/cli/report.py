"""`forge-harness report`: write the reports of a run again; never gates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.options import examples, open_run, run_dir_argument
from forge_harness.cli.run import DEFAULT_FORMATS, parse_formats
from forge_harness.errors import RunDirectoryError, VerificationError

if TYPE_CHECKING:
    from forge_harness.policy import Policy
    from forge_harness.record import RunRecord


@click.command(
    "report",
    epilog=examples(
        "forge-harness report first --format html,json,md,junit",
        "forge-harness report first --format html --out public",
    ),
)
@run_dir_argument
@click.option(
    "--format",
    "formats",
    default=DEFAULT_FORMATS,
    show_default=True,
    callback=parse_formats,
    help="Reports to write: html, json, md, junit.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write here instead of into the run directory, which stays as it is.",
)
def report_command(directory: Path, formats: tuple[str, ...], out: Path | None) -> None:
    """Write the reports of the run in DIR again, from its record and policy.

    The exit code does not depend on the verdict: `gate` gates. Without --out the run must
    verify, since writing into it renews its manifest.
    """
    record, policy = open_run(directory)
    if out is None:
        written = _renew(directory, record, policy, formats)
    else:
        written = _elsewhere(out, record, policy, formats)
    for path in written:
        click.echo(path)


def _renew(
    directory: Path, record: RunRecord, policy: Policy, formats: tuple[str, ...]
) -> list[Path]:
    from forge_harness.finish import finish_run
    from forge_harness.scoring import verify_run

    problems = verify_run(directory)
    if problems:
        raise VerificationError(
            f"{directory} does not verify ({problems[0].sentence()}); a new manifest would hide "
            "that. Use --out DIR to write the reports elsewhere."
        )
    return finish_run(directory, record, policy, formats)


def _elsewhere(
    out: Path, record: RunRecord, policy: Policy, formats: tuple[str, ...]
) -> list[Path]:
    from forge_harness.report import write_reports

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"Cannot make {out}: {error.strerror}.") from error
    return write_reports(out, record, policy, formats)
