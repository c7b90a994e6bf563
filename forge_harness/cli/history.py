"""`forge-harness history`: the runs that are kept, as a trend, a table, or under another policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from forge_harness.cli.github import text_without_commands, without_commands
from forge_harness.cli.history_text import breaks_between, refused_lines, rescored_lines, trend
from forge_harness.cli.options import (
    NamedPath,
    check_target,
    config_option,
    examples,
    json_option,
    load,
)
from forge_harness.cli.terminal import echo_json, say, shown

if TYPE_CHECKING:
    from forge_harness.cli.stored_runs import StoredRun
    from forge_harness.policy import Policy
    from forge_harness.record import RunRecord
    from forge_harness.scoring import Rescored

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _runs_argument(command: _Command) -> _Command:
    return click.argument("directories", metavar="[DIR]...", nargs=-1, type=NamedPath())(command)


@click.group(
    "history",
    epilog=examples(
        "forge-harness history show",
        "forge-harness history export --format csv --out runs.csv",
        "forge-harness history rescore --policy strict.toml",
    ),
)
def history_group() -> None:
    """Look at the runs that are kept: a trend, a table, or scores under another policy."""


@history_group.command(
    "show", epilog=examples("forge-harness history show", "forge-harness history show first second")
)
@_runs_argument
@config_option
@json_option
def show_command(directories: tuple[Path, ...], config_file: Path | None, as_json: bool) -> None:
    """Show the runs in each DIR, oldest first, and where two runs do not compare.

    DIR is the directory of a run or one that holds such directories (default: paths.runs). Each run
    is verified; one that does not is listed without a score.
    """
    from forge_harness.cli.history_export import described
    from forge_harness.cli.stored_runs import stored_runs

    found = stored_runs(config_file, directories)
    breaks = breaks_between(found)
    if as_json:
        pairs = zip(found.runs, breaks, strict=True)
        rows = [{**described(run), "breaks": [asdict(b) for b in broken]} for run, broken in pairs]
        echo_json({"runs": rows, "refused": [refused.to_json() for refused in found.refused]})
        return
    _print([*trend(found, breaks), *refused_lines(found)])


@history_group.command(
    "export",
    epilog=examples(
        "forge-harness history export --format csv --out runs.csv",
        "forge-harness history export nightly --format json",
    ),
)
@_runs_argument
@config_option
@click.option(
    "--format",
    "kind",
    type=click.Choice(["csv", "json"]),
    default="csv",
    show_default=True,
    help="Text cells of a CSV that a spreadsheet would take for a formula begin with a quote.",
)
@click.option(
    "--out",
    type=NamedPath(),
    metavar="FILE",
    help="Write here instead of to standard output; outside of any run.",
)
def export_command(
    directories: tuple[Path, ...], config_file: Path | None, kind: str, out: Path | None
) -> None:
    """Write one row a run: verdict, score, what it compares by, and the value of each gate.

    Runs that do not verify have no row; they are named on standard error, and in JSON.
    """
    from forge_harness.cli.history_export import exported
    from forge_harness.cli.stored_runs import stored_runs
    from forge_harness.durable import write_durably

    check_target(out)
    content, refused = exported(stored_runs(config_file, directories), kind)
    for run in refused:
        say(without_commands(f"Left out: {run.line()}"))
    if out is None:
        click.echo(content, nl=False)
    else:
        write_durably(out, content)
        click.echo(out)


@history_group.command(
    "rescore",
    epilog=examples(
        "forge-harness history rescore --policy strict.toml",
        "forge-harness history rescore last-week --policy first/policy.json",
    ),
)
@_runs_argument
@config_option
@click.option(
    "--policy",
    "policy_file",
    required=True,
    type=NamedPath(),
    metavar="FILE",
    help="As for `run`: TOML laid over the shipped policy, or the policy.json of a run.",
)
@json_option
def rescore_command(
    directories: tuple[Path, ...], config_file: Path | None, policy_file: Path, as_json: bool
) -> None:
    """Score the runs in each DIR under another policy; the directories stay as they are.

    Values of gates are judged again, weights and severities count as the new policy has them. What
    the evidence does not answer is in the notes. Never gates.
    """
    from forge_harness.cli.stored_runs import stored_runs
    from forge_harness.selection import build_policy, catalogues_beside

    policy = build_policy(policy_file, catalogues_beside(load(config_file).suite_paths()))
    found = stored_runs(config_file, directories)
    # A policy.json is whole; TOML is laid over what is there, and inline checks are in no file.
    is_whole = policy_file.suffix == ".json"
    again = [_rescored(run, policy, is_whole=is_whole) for run in found.runs]
    if as_json:
        rows = [_rescored_row(run, done) for run, done in zip(found.runs, again, strict=True)]
        refused = [run.to_json() for run in found.refused]
        echo_json({"policy_digest": policy.digest, "runs": rows, "refused": refused})
        return
    _print([*rescored_lines(found, again, policy), *refused_lines(found)])


def _print(lines: Sequence[str]) -> None:
    # The names of directories and runs are those of whoever could write where runs are kept.
    click.echo(text_without_commands(lines))


def _rescored(run: StoredRun, policy: Policy, *, is_whole: bool) -> Rescored:
    """Scores a run under a policy, with the checks that markers defined when it ran."""
    from forge_harness.rundir import read_items
    from forge_harness.scoring import rescore
    from forge_harness.selection import inline_of, with_inline

    inline = [] if is_whole else inline_of(run.policy, policy)
    extended = with_inline(policy, inline)
    done = rescore(run.record, run.policy, extended, read_items(run.directory))
    if not inline:
        return done
    names = ", ".join(check.check for check in inline)
    note = (
        f"Kept as their markers defined them when it ran, they are in no file: {names}; with them "
        f"the policy is {extended.digest}."
    )
    return replace(done, notes=(note, *done.notes))


def _rescored_row(run: StoredRun, again: Rescored) -> dict[str, Any]:
    sides = {"before": run.record, "after": again.record}
    return {
        "run_id": run.record.run_id,
        "directory": shown(run.directory),
        **{side: _result(record) for side, record in sides.items()},
        "notes": list(again.notes),
    }


def _result(record: RunRecord) -> dict[str, Any]:
    return {
        "verdict": record.verdict,
        "reasons": record.verdict_reasons,
        "score": {"low": record.score.low, "high": record.score.high},
        "coverage": record.coverage,
        "policy_digest": record.policy_digest,
    }
