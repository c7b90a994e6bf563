"""`forge-harness baseline`: the accepted run as a file that is reviewed like code."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.gate import accepted, admitted
from forge_harness.cli.github import not_obeyed
from forge_harness.cli.options import NamedPath, check_target, examples, json_option
from forge_harness.cli.summary import score_sentence
from forge_harness.cli.terminal import echo_json, printable, several, shown
from forge_harness.errors import ForgeError, UsageError, VerificationError

if TYPE_CHECKING:
    from forge_harness.integration.baselines import Acceptance, Baseline
    from forge_harness.record import RunRecord

_FILE = "forge-baseline.json"
_PATH = NamedPath()


@click.group(
    "baseline",
    epilog=examples(
        'forge-harness baseline accept first --owner ada --reason "new recipe"',
        "forge-harness gate second --baseline forge-baseline.json",
    ),
)
def baseline_group() -> None:
    """Accept a run as what later ones are held against (`gate --baseline FILE`)."""


@baseline_group.command(
    "accept",
    epilog=examples(
        'forge-harness baseline accept first --owner ada --reason "new recipe, see #12"'
    ),
)
@click.argument("directory", metavar="DIR", type=_PATH)
@click.option("--owner", required=True, metavar="WHO", help="Who answers for it.")
@click.option("--reason", required=True, metavar="WHY", help="Why this run is the new measure.")
@click.option("--expires", metavar="DAY", default="", help="Last day it is good for: 2026-12-31.")
@click.option(
    "--out", type=_PATH, default=Path(_FILE), metavar="FILE", show_default=True, help="The file."
)
def accept_command(directory: Path, owner: str, reason: str, expires: str, out: Path) -> None:
    """Write the verified run in DIR as a baseline file, for a review to look at.

    Score, gate values and the outcome of each check have a line each; nothing moves a baseline by
    itself. A run that failed, was cut short or covers a selection is refused.
    """
    from forge_harness.canonical import file_sha256
    from forge_harness.integration.baselines import write_baseline
    from forge_harness.integration.quality_coordinator import QualityCoordinator
    from forge_harness.rundir import RUN

    check_target(out)
    record, policy = admitted(directory)
    _refuse_unfit(record, directory)
    acceptance = _acceptance(owner, reason, expires, f"sha256:{file_sha256(directory / RUN)}")
    baseline = QualityCoordinator(policy).baseline_of(record, acceptance)
    moved = _moved(out, baseline) if out.exists() else []
    write_baseline(out, baseline)
    told = f"{shown(out)}: run {baseline.run_id}, {record.verdict}. {score_sentence(record)}"
    click.echo(printable(told))
    for line in moved:
        click.echo(line)
    if baseline.dirty:
        click.echo("Note: it measured changes that are not in its commit.")


@baseline_group.command("show", epilog=examples("forge-harness baseline show --run first"))
@click.argument("file", metavar="[FILE]", type=_PATH, default=Path(_FILE))
@click.option("--run", "directory", type=_PATH, metavar="DIR", help="Hold it against its run.")
@json_option
def show_command(file: Path, directory: Path | None, as_json: bool) -> None:
    """Show who accepted which run, and what it is compared by.

    With --run the file is computed again from the run in DIR; exit 8 names what differs.
    """
    baseline = accepted(file)
    if baseline.acceptance is None:
        raise UsageError(f"{file} is a run; expected the file of `forge-harness baseline accept`.")
    if directory is not None:
        _hold_against(baseline, file, directory)
    if as_json:
        echo_json(baseline.model_dump(mode="json"))
        return
    click.echo(_text(baseline, baseline.acceptance))
    if directory is not None:
        click.echo(f"It is what the run in {shown(directory)} gives.")


def _acceptance(owner: str, reason: str, expires: str, digest: str) -> Acceptance:
    from pydantic import ValidationError

    from forge_harness.integration.baselines import Acceptance

    today = datetime.now(UTC).date().isoformat()
    try:
        made = Acceptance(
            owner=owner,
            reason=reason,
            accepted_on=today,
            expires=expires,
            run_digest=digest,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--{first['loc'][0]} {first['input']!r}: {first['msg']}.") from error
    if made.expires and made.expires < today:
        raise UsageError(f"--expires {made.expires} is over; expected a day from {today} on.")
    return made


def _refuse_unfit(record: RunRecord, directory: Path) -> None:
    from forge_harness.types import Verdict

    unfit = {
        Verdict.FAIL: "it failed; mend it, or waive what is known",
        Verdict.PARTIAL: "it covers a selection only; run the whole profile",
    }
    why = unfit.get(record.verdict)
    if why is None and record.state != "finished":
        why = f"it is {record.state}; run it to its end"
    if why is not None:
        raise UsageError(f"The run in {directory} is no baseline: {why}.")


def _moved(file: Path, now: Baseline) -> list[str]:
    """Returns what the new file changes of the old one, a line each."""
    from forge_harness.integration.baselines import read_baseline

    try:
        before = read_baseline(file)
    except ForgeError:
        # A mistyped --out must not cost a file of another kind.
        raise UsageError(
            f"{file} exists and is no baseline; name another file, or remove it."
        ) from None
    lines = [f"Replaces {before.run_id}: {score_sentence(before)}"]
    lines += [
        f"  {name}: {before.facts[name]} -> {now.facts[name]}"
        for name in now.facts
        if before.facts[name] != now.facts[name]
    ]
    lines += [
        f"  {gate}: {_number(before.gates.get(gate))} -> {_number(now.gates.get(gate))}"
        for gate in sorted({*before.gates, *now.gates})
        if before.gates.get(gate) != now.gates.get(gate)
    ]
    return [not_obeyed(line) for line in lines]


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6g}"


def _hold_against(baseline: Baseline, file: Path, directory: Path) -> None:
    """Refuses a file that is not what its run gives.

    Raises:
        VerificationError: With the first place that differs.
    """
    from forge_harness.canonical import file_sha256
    from forge_harness.integration.quality_coordinator import QualityCoordinator
    from forge_harness.rundir import RUN

    record, policy = admitted(directory)
    acceptance = baseline.acceptance
    assert acceptance is not None
    digest = f"sha256:{file_sha256(directory / RUN)}"
    again = QualityCoordinator(policy).baseline_of(
        record, acceptance.model_copy(update={"run_digest": digest})
    )
    claimed, expected = baseline.model_dump(mode="json"), again.model_dump(mode="json")
    for key in expected:
        if claimed[key] != expected[key]:
            raise VerificationError(
                f"{file} is not what the run in {directory} gives: {key} "
                f"{_difference(expected[key], claimed[key])}."
            )


def _difference(expected: object, found: object) -> str:
    if isinstance(expected, dict) and isinstance(found, dict):
        name = min(k for k in {*expected, *found} if expected.get(k) != found.get(k))
        return f"{name}: expected {expected.get(name)}, found {found.get(name)}"
    return f"expected {expected}, found {found}"


def _text(baseline: Baseline, acceptance: Acceptance) -> str:
    until = f" until {acceptance.expires}" if acceptance.expires else ""
    commit = f"{baseline.commit or 'none'}{' with uncommitted changes' if baseline.dirty else ''}"
    lines = [
        f"Run {baseline.run_id}, {baseline.verdict}. {score_sentence(baseline)}",
        f"Accepted on {acceptance.accepted_on}{until} by {acceptance.owner}: {acceptance.reason}",
        f"commit: {commit}",
        *(f"{name}: {value}" for name, value in baseline.facts.items()),
        f"run.json: {acceptance.run_digest}",
        f"{several(len(baseline.checks), 'check')}, {several(len(baseline.gates), 'gate value')}:",
        *(f"  {gate}: {value:.6g}" for gate, value in sorted(baseline.gates.items())),
    ]
    return "\n".join(map(not_obeyed, lines))
