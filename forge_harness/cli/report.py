"""`forge-harness report`: write the reports of a run again; never gates."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.directory_lock import alone_in
from forge_harness.cli.gate import accepted, admitted, admitted_here
from forge_harness.cli.options import (
    NamedPath,
    WholeNumber,
    baseline_option,
    examples,
    run_dir_argument,
)
from forge_harness.cli.run import DEFAULT_FORMATS, parse_formats
from forge_harness.cli.terminal import say
from forge_harness.errors import ConfigError, RunDirectoryError, UsageError
from forge_harness.rundir import DiskFullError, leftovers

if TYPE_CHECKING:
    from forge_harness.integration.baselines import AcceptedRun
    from forge_harness.integration.kept_runs import History, KeptRun
    from forge_harness.policy import Policy
    from forge_harness.record import RunRecord


@click.command(
    "report",
    epilog=examples(
        "forge-harness report first --format html,json,md,junit,ctrf,sarif",
        "forge-harness report first --format html --out public",
        "forge-harness report second --baseline first --history forge-runs",
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
    type=NamedPath(),
    metavar="DIR",
    help="Write here instead of into the run directory, which stays as it is.",
)
@baseline_option
@click.option(
    "--history",
    "kept_in",
    multiple=True,
    type=NamedPath(),
    metavar="DIR",
    help="Show the runs in DIR that lead up to this one, as `history` finds them (repeatable).",
)
@click.option(
    "--last",
    type=WholeNumber(min=1, max=100),
    metavar="N",
    help="At most N of them, the newest (default: 20).",
)
def report_command(
    directory: Path,
    formats: tuple[str, ...],
    out: Path | None,
    accepted_at: Path | None,
    kept_in: tuple[Path, ...],
    last: int | None,
) -> None:
    """Write the reports of the run in DIR again, from its record and policy.

    With --baseline they say what changed, with --history how it got here; `verify` renders them
    again from what both gave.

    The exit code does not depend on the verdict: `gate` gates. But the run must verify, as it must
    for `gate`: a report of a forged record would look like one of a sound run. Only the reports
    that are written now may be missing or changed, as a writing that was killed leaves them.
    """
    if last is not None and not kept_in:
        raise UsageError("--last goes with --history DIR: name where the runs are kept.")
    if out is not None:
        _refuse_within_a_run(out)
    # Before the run is held: two that wait for each other's run would wait for ever.
    baseline = None if accepted_at is None else accepted(accepted_at)
    kept = _kept(kept_in) if kept_in else None
    with alone_in(directory) if out is None else nullcontext():
        if out is None:
            record, policy = admitted_here(directory, _renewed(directory, formats))
        else:
            record, policy = admitted(directory)
        history = None if kept is None else _leading_to(record, kept, last)
        write = _anew if out is None else _elsewhere
        written = write(out or directory, record, policy, formats, (baseline, history))
    for path in written:
        click.echo(path)


def _renewed(directory: Path, formats: tuple[str, ...]) -> set[str]:
    """Returns the files that writing replaces, which a killed writer may have left as they came.

    A run must not be lost for a page that its record gives again.
    """
    from forge_harness.report.provenance import REPORTS
    from forge_harness.report.write import WRITERS

    return {REPORTS, *(WRITERS[name][0] for name in formats), *leftovers(directory)}


def _anew(
    directory: Path,
    record: RunRecord,
    policy: Policy,
    formats: tuple[str, ...],
    compared: tuple[AcceptedRun | None, History | None],
) -> list[Path]:
    """Writes reports into their run, and seals it again."""
    from forge_harness.finish import finish_run
    from forge_harness.integration.stops import uninterrupted

    baseline, history = compared
    # Between the first new report and the new manifest the run does not verify.
    with uninterrupted():
        written = finish_run(directory, record, policy, formats, baseline=baseline, history=history)
    if not written:
        raise DiskFullError(
            f"No space left for the reports of {directory}, which are as they were; free some and "
            "run it again."
        )
    return written


def _kept(kept_in: tuple[Path, ...]) -> tuple[list[KeptRun], int]:
    """Finds, verifies and reads kept runs; names those that cannot, and returns how many.

    That there is none yet is how every history begins, and no reason to write no report.
    """
    from forge_harness.canonical import file_sha256
    from forge_harness.cli.stored_runs import RefusedRun, found_runs
    from forge_harness.integration.kept_runs import KeptRun, kept_run
    from forge_harness.rundir import RUN

    found = found_runs(None, kept_in)
    refused, kept = list(found.refused), list[KeptRun]()
    for run in found.runs:
        digest = f"sha256:{file_sha256(run.directory / RUN)}"
        try:
            kept.append(kept_run(run.record, run.policy, digest))
        except ConfigError as error:
            refused.append(RefusedRun(run.directory, "has no gate values", str(error)))
    for run_left_out in refused:
        say(f"Left out: {run_left_out.line()}")
    return kept, sum(run.is_run for run in refused)


def _leading_to(record: RunRecord, kept: tuple[list[KeptRun], int], last: int | None) -> History:
    from forge_harness.integration.kept_runs import MOST_RUNS, leading_to

    runs, without_score = kept
    return leading_to(record, runs, last or MOST_RUNS, without_score=without_score)


def _refuse_within_a_run(out: Path) -> None:
    """A file that a run's manifest does not name is damage to that run, whoever put it there."""
    from forge_harness.rundir import run_around

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
    compared: tuple[AcceptedRun | None, History | None],
) -> list[Path]:
    from forge_harness.report import write_reports

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"Cannot make {out}: {error.strerror}.") from error
    baseline, history = compared
    return write_reports(out, record, policy, formats, baseline=baseline, history=history)
