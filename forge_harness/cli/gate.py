"""`forge-harness gate`: the exit code of a run, for CI."""

from __future__ import annotations

import os
from pathlib import Path

import click

from forge_harness.cli.github import annotation_commands, append_summary, is_action
from forge_harness.cli.options import examples, open_run, run_dir_argument
from forge_harness.cli.summary import MEANINGS, verdict_lines
from forge_harness.errors import ExitCode, ForgeError, VerificationError
from forge_harness.policy import Policy
from forge_harness.record import RunRecord
from forge_harness.rundir import MANIFEST, RUN
from forge_harness.types import Verdict

_SHOWN = 5


class UnfinishedRunError(ForgeError):
    """A run was killed or is still going on: nothing in it can be gated."""

    exit_code = ExitCode.INCOMPLETE


@click.command(
    "gate",
    epilog=examples(
        "forge-harness gate forge-runs/20260301T101500Z", "forge-harness gate first --fail-on warn"
    ),
)
@run_dir_argument
@click.option(
    "--fail-on",
    type=click.Choice(["fail", "incomplete", "warn"]),
    default="incomplete",
    show_default=True,
    help="What ends with an exit code other than 0: only FAIL; also INCOMPLETE and PARTIAL; "
    "or also PASS_WITH_WARNINGS.",
)
def gate_command(directory: Path, fail_on: str) -> int:
    """Exit by the verdict of the run in DIR: 0 pass, 1 fail, 7 incomplete.

    The run is verified first: a damaged one is refused with 8, an unfinished one with 7. In
    GitHub Actions the gate annotates the run and writes the step summary.
    """
    record, policy = admitted(directory)
    code = decide(record, fail_on)
    for line in verdict_lines(record):
        click.echo(line)
    if is_action(os.environ):
        for command in annotation_commands(record):
            click.echo(command)
    _summarise(record, policy)
    click.echo(f"Exit code {int(code)}: {_meaning(record, code, fail_on)}.")
    return code


def admitted(directory: Path) -> tuple[RunRecord, Policy]:
    """Reads a run that may be gated.

    Raises:
        RunDirectoryError: There is no run in the directory.
        UnfinishedRunError: The run did not end.
        VerificationError: The directory does not hold what it claims to hold.
    """
    from forge_harness.errors import RunDirectoryError
    from forge_harness.scoring import verify_run

    try:
        record, policy = open_run(directory)
    except RunDirectoryError as error:
        # What is there but cannot be understood, or a run without its record, is damage and not a
        # wrong argument.
        if any((directory / name).exists() for name in (RUN, MANIFEST)):
            raise VerificationError(f"Refused: {error}") from error
        raise
    if record.state == "running":
        raise UnfinishedRunError(
            f"Refused: the run in {directory} did not finish; run it again to gate it."
        )
    problems = verify_run(directory)
    if problems:
        shown = "; ".join(problem.sentence() for problem in problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise VerificationError(f"Refused: {directory} does not verify: {shown}{more}.")
    return record, policy


def decide(record: RunRecord, fail_on: str) -> ExitCode:
    """Returns the exit code of a finished, verified run under `--fail-on`."""
    from forge_harness.scoring import gate_exit_code

    code = gate_exit_code(record)
    if fail_on == "warn" and record.verdict is Verdict.PASS_WITH_WARNINGS:
        return ExitCode.GATE_FAILED
    if fail_on == "fail" and code is ExitCode.INCOMPLETE and record.state == "finished":
        return ExitCode.PASS
    return code


def _meaning(record: RunRecord, code: ExitCode, fail_on: str) -> str:
    if code is ExitCode.PASS and record.verdict in (Verdict.INCOMPLETE, Verdict.PARTIAL):
        return f"{record.verdict} is accepted by --fail-on fail; what is missing is not proved"
    if code is ExitCode.GATE_FAILED and fail_on == "warn" and record.verdict is not Verdict.FAIL:
        return "gate failed: warnings fail it under --fail-on warn"
    return MEANINGS[code]


def _summarise(record: RunRecord, policy: Policy) -> None:
    if not os.environ.get("GITHUB_STEP_SUMMARY"):
        return
    from forge_harness.report import build_report, render_markdown

    try:
        append_summary(render_markdown(build_report(record, policy)), os.environ)
    except OSError as error:
        # The verdict stands; a page that cannot be written must not change the exit code.
        click.echo(f"Warning: the step summary cannot be written: {error.strerror}.", err=True)
