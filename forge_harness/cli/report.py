"""`forge-harness report`: write the reports of a run again; never gates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.gate import accepted, admitted
from forge_harness.cli.options import baseline_option, examples, run_dir_argument
from forge_harness.cli.run import DEFAULT_FORMATS, parse_formats
from forge_harness.errors import RunDirectoryError, UsageError

if TYPE_CHECKING:
    from forge_harness.integration.baselines import AcceptedRun
    from forge_harness.policy import Policy
    from forge_harness.record import RunRecord


@click.command(
    "report",
    epilog=examples(
        "forge-harness report first --format html,json,md,junit,ctrf,sarif",
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
    help="Reports to write: html, json, md, junit, ctrf, sarif.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write here instead of into the run directory, which stays as it is.",
)
@baseline_option
def report_command(
    directory: Path, formats: tuple[str, ...], out: Path | None, accepted_at: Path | None
) -> None:
    """Write the reports of the run in DIR again, from its record and policy.

    The exit code does not depend on the verdict: `gate` gates. But the run must verify, as it must
    for `gate`: a report of a forged record would look like one of a sound run.
    """
    from forge_harness.finish import finish_run
    from forge_harness.integration.stops import uninterrupted

    if out is not None:
        _refuse_within_a_run(out)
    record, policy = admitted(directory)
    baseline = None if accepted_at is None else accepted(accepted_at)
    if out is None:
        # Between the first new report and the new manifest the run does not verify.
        with uninterrupted():
            written = finish_run(directory, record, policy, formats, baseline=baseline)
    else:
        written = _elsewhere(out, record, policy, formats, baseline)
    for path in written:
        click.echo(path)


def _refuse_within_a_run(out: Path) -> None:
    """A file that a run's manifest does not name is damage to that run, whoever put it there."""
    from forge_harness.cli.stored_runs import run_around

    run = run_around(out)
    if run is not None:
        raise UsageError(
            f"--out {out} is within a run ({run}), which would no longer verify; choose a "
            "directory outside of it, or leave --out away to renew the run's own reports."
        )


def _elsewhere(
    out: Path,
    record: RunRecord,
    policy: Policy,
    formats: tuple[str, ...],
    baseline: AcceptedRun | None,
) -> list[Path]:
    from forge_harness.report import write_reports

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"Cannot make {out}: {error.strerror}.") from error
    return write_reports(out, record, policy, formats, baseline=baseline)
