"""`forge-harness gate`: the exit code of a run, for CI."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.directory_lock import unwritten
from forge_harness.cli.github import (
    annotation_commands,
    append_summary,
    is_action,
    not_obeyed,
    without_commands,
)
from forge_harness.cli.options import baseline_option, examples, open_run, run_dir_argument
from forge_harness.cli.pages import rendered_again, unverified_lines
from forge_harness.cli.summary import MEANINGS, verdict_lines
from forge_harness.cli.terminal import printable, say
from forge_harness.errors import ExitCode, ForgeError, UsageError, VerificationError
from forge_harness.policy import Policy
from forge_harness.record import RunRecord, moment
from forge_harness.rundir import MANIFEST, NOT_PLAIN, RUN
from forge_harness.types import Verdict

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from forge_harness.integration.baselines import Baseline
    from forge_harness.scoring import Discrepancy

_SHOWN = 5
_WARNED = Verdict.PASS_WITH_WARNINGS
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class UnfinishedRunError(ForgeError):
    """A run was killed or is still going on: nothing in it can be gated."""

    exit_code = ExitCode.INCOMPLETE


class BaselineError(ForgeError):
    """There is no run to compare with."""

    exit_code = ExitCode.BASELINE_MISSING


def _parse_digest(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> str | None:
    if text is not None and not _DIGEST.fullmatch(text):
        raise UsageError(
            f"--policy-digest {text!r} is no digest; expected sha256: and 64 hexadecimal digits, "
            "as `gate` prints them after Policy."
        )
    return text


@click.command(
    "gate",
    epilog=examples(
        "forge-harness gate forge-runs/20260301T101500Z",
        "forge-harness gate first --fail-on warn",
        'forge-harness gate first --policy-digest "$REVIEWED_POLICY"',
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
@baseline_option
@click.option(
    "--policy-digest",
    "pinned",
    metavar="sha256:...",
    callback=_parse_digest,
    help="The policy the run must have been scored under, as `run` and `gate` print it; a run "
    "under another one is refused with 8.",
)
def gate_command(
    directory: Path, fail_on: str, accepted_at: Path | None, pinned: str | None
) -> int:
    """Exit by the verdict of the run in DIR: 0 pass, 1 fail, 7 incomplete.

    The run and its reports are verified first, as by `verify`: a damaged one is refused with 8, an
    unfinished one with 7, and a pass whose reports cannot be verified here is incomplete. With
    --baseline a run that is worse than the baseline fails, and 9 says that the two do not compare
    (`baseline accept` makes a file to review).
    In GitHub Actions the gate annotates the run and writes the step summary.
    """
    from forge_harness.scoring import policy_line

    with unwritten(directory):
        record, policy = admitted_here(directory)
        _refuse_another_policy(directory, policy, pinned)
        open_pages = unverified_pages(directory, record, policy)
    baseline = None if accepted_at is None else accepted(accepted_at)
    code = decide(record, fail_on)
    lines = [*verdict_lines(record), printable(policy_line(policy))]
    reasons = record.verdict_reasons
    if baseline is not None:
        compared = compare(record, policy, baseline)
        code = compared.code_with(code, fail_on)
        lines += compared.lines
        reasons = compared.worse or [*compared.lost, *reasons]
    lines += open_pages
    meaning = _meaning(record, code, fail_on)
    if open_pages and code is ExitCode.PASS:
        code, meaning = _of_open_pages(fail_on, meaning)
        reasons = open_pages
    in_action = is_action(os.environ)
    for line in lines:
        click.echo(without_commands(line) if in_action else line)
    if in_action:
        for command in annotation_commands(record, [] if code is ExitCode.PASS else reasons):
            click.echo(command)
    _summarise(record, policy, baseline)
    click.echo(f"Exit code {int(code)}: {meaning}.")
    return code


def _refuse_another_policy(directory: Path, policy: Policy, pinned: str | None) -> None:
    if pinned is not None and policy.digest != pinned:
        raise VerificationError(
            f"Refused: the run in {directory} was scored under policy {policy.digest}, not under "
            f"{pinned} (--policy-digest); run it under that policy, or pin this one after a review."
        )


def admitted(directory: Path) -> tuple[RunRecord, Policy]:
    """Reads a run that may be gated, while nobody writes reports into it.

    Raises:
        RunDirectoryError: There is no run in the directory.
        UnfinishedRunError: The run did not end.
        VerificationError: The directory does not hold what it claims to hold.
    """
    with unwritten(directory):
        return admitted_here(directory)


def admitted_here(
    directory: Path, renewed: Container[str] = frozenset()
) -> tuple[RunRecord, Policy]:
    """Reads a run as `admitted` does, for whoever holds it already.

    Args:
        directory: The run.
        renewed: Files in it that are made anew from the record at once: what is there of them does
            not matter.
    """
    from forge_harness.errors import RunDirectoryError
    from forge_harness.scoring import verify_run

    try:
        record, policy = open_run(directory)
    except RunDirectoryError as error:
        # What is there but cannot be understood, or a run without its record, is damage and not a
        # wrong argument.
        if any((directory / name).exists() for name in (RUN, MANIFEST)):
            raise VerificationError(f"Refused: {not_obeyed(str(error))}") from error
        raise
    if record.state == "running":
        raise UnfinishedRunError(
            f"Refused: the run in {directory} did not finish; run it again to gate it."
        )
    problems = verify_run(directory)
    # A link would be written through, or keep the run from being sealed.
    _refuse(directory, [p for p in problems if p.file not in renewed or p.what == NOT_PLAIN])
    _refuse_the_future(directory, record)
    return record, policy


def _refuse_the_future(directory: Path, record: RunRecord) -> None:
    """A start that is to come keeps waivers and baselines from ever being judged by their days."""
    starts = [record.started_at, *(shard.started_at for shard in record.shards)]
    latest = max(starts, key=moment)
    # Clocks of two machines differ, by hours where one takes its local time for UTC.
    if moment(latest) > datetime.now(UTC) + timedelta(days=1):
        raise VerificationError(
            f"Refused: the run in {directory} started on {latest}, which is to come; run it again "
            "on a machine whose clock is right, or set the clock of this one."
        )


def unverified_pages(directory: Path, record: RunRecord, policy: Policy) -> list[str]:
    """Returns a sentence for each report of an admitted run that another release made.

    Raises:
        VerificationError: A report is not that of the run.
    """
    reports = rendered_again(directory, record, policy)
    _refuse(directory, reports.problems)
    return unverified_lines(directory, reports)


def _refuse(directory: Path, problems: Sequence[Discrepancy]) -> None:
    if problems:
        # The names of files are those of whoever could write into the run.
        shown = "; ".join(not_obeyed(problem.sentence()) for problem in problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise VerificationError(f"Refused: {directory} does not verify: {shown}{more}.")


def accepted(path: Path) -> Baseline:
    """Reads what a gate or report compares with: a run directory, or the file of an accepted run.

    Raises:
        BaselineError: There is none, or it did not end.
        VerificationError: The directory does not hold what it claims to hold.
    """
    from forge_harness.canonical import file_sha256
    from forge_harness.errors import ConfigError, RunDirectoryError
    from forge_harness.integration.baselines import read_baseline
    from forge_harness.integration.quality_coordinator import QualityCoordinator

    try:
        if path.is_file():
            return read_baseline(path)
        record, policy = admitted(path)
    except (ConfigError, RunDirectoryError, UnfinishedRunError) as error:
        raise BaselineError(f"No baseline: {error}") from error
    digest = f"sha256:{file_sha256(path / RUN)}"
    baseline = QualityCoordinator(policy).baseline_of(record)
    return baseline.model_copy(update={"run_digest": digest})


@dataclass(frozen=True, slots=True)
class Compared:
    """A run beside its baseline."""

    lines: list[str]
    worse: list[str]
    """A sentence for each value that is worse beyond its tolerance."""
    comparable: bool
    lost: list[str] = field(default_factory=list)
    """A sentence for each value that the baseline has and the run has not."""

    def code_with(self, code: ExitCode, fail_on: str) -> ExitCode:
        """Returns the exit code of a gate whose verdict alone would end with `code`."""
        if self.worse:
            return ExitCode.GATE_FAILED
        if code is not ExitCode.PASS:
            return code
        if not self.comparable:
            return ExitCode.BASELINE_MISSING
        return ExitCode.INCOMPLETE if self.lost and fail_on != "fail" else code


def compare(record: RunRecord, policy: Policy, baseline: Baseline) -> Compared:
    """Compares a run with its baseline: the score, and the value of each gate."""
    from forge_harness.integration.quality_coordinator import QualityCoordinator

    found = QualityCoordinator(policy).compare_baseline(record, baseline)
    name = f"baseline {printable(baseline.run_id)}"
    if not found.comparable:
        line = f"The {name} does not compare: {printable(found.reason)}."
        return Compared([line], [], comparable=False)
    worse = [printable(row.reason) for row in found.regressions]
    lost = [printable(row.reason) for row in found.lost]
    head = f"Worse than {name}:" if worse else f"Not worse than {name}."
    if lost and not worse:
        head = f"Not shown to be as good as {name}:"
    lines = [head, *(f"  - {reason}" for reason in (*worse, *lost))]
    return Compared(lines, worse, comparable=True, lost=lost)


def decide(record: RunRecord, fail_on: str) -> ExitCode:
    """Returns the exit code of a finished, verified run under `--fail-on`."""
    from forge_harness.scoring import gate_exit_code

    code = gate_exit_code(record)
    if fail_on == "warn" and record.verdict is Verdict.PASS_WITH_WARNINGS:
        return ExitCode.GATE_FAILED
    if fail_on == "fail" and code is ExitCode.INCOMPLETE and record.state == "finished":
        return ExitCode.PASS
    return code


def _of_open_pages(fail_on: str, meaning: str) -> tuple[ExitCode, str]:
    """Returns how a gate ends that would pass but for reports that cannot be verified."""
    if fail_on == "fail":
        accepted = "reports that are not verified are accepted by --fail-on fail"
        return ExitCode.PASS, f"{meaning}; {accepted}"
    return ExitCode.INCOMPLETE, "incomplete: a report is not verified"


def _meaning(record: RunRecord, code: ExitCode, fail_on: str) -> str:
    if code is ExitCode.PASS and record.verdict in (Verdict.INCOMPLETE, Verdict.PARTIAL):
        return f"{record.verdict} is accepted by --fail-on fail; what is missing is not proved"
    if code is ExitCode.GATE_FAILED and fail_on == "warn" and record.verdict is _WARNED:
        return "gate failed: warnings fail it under --fail-on warn"
    return MEANINGS[code]


def _summarise(record: RunRecord, policy: Policy, baseline: Baseline | None) -> None:
    if not os.environ.get("GITHUB_STEP_SUMMARY"):
        return
    from forge_harness.report import build_report, render_markdown

    try:
        append_summary(render_markdown(build_report(record, policy, baseline)), os.environ)
    except OSError as error:
        # The verdict stands; a page that cannot be written must not change the exit code.
        say(f"Warning: the step summary cannot be written: {error.strerror}.")
