"""`forge-harness drill`: faults put in on purpose, and what they found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.canonical import canonical_json
from forge_harness.durable import write_durably
from forge_harness.errors import ExitCode, UsageError
from forge_harness.imports import import_from

from .drill_suites import suites_command
from .options import NamedPath, WholeNumber, check_target, examples, once
from .progress import counted

if TYPE_CHECKING:
    from forge_harness.drill.storage import MutantReport, StorageReport
    from forge_harness.drill.tally import CampaignReport


@click.group(
    "drill", epilog=examples("forge-harness drill suites", "forge-harness drill storage --quick")
)
def drill_group() -> None:
    """Put faults in on purpose and count what they break, and what finds them."""


drill_group.add_command(suites_command)


@drill_group.command(
    "storage",
    epilog=examples(
        "forge-harness drill storage --quick",
        "forge-harness drill storage --campaign kill --campaign errors --json storage.json",
        "forge-harness drill storage --campaign bit_flips --trials 10000 --seed 7",
        "forge-harness drill storage --mutants",
    )
    + "\n\n\b\nExit codes: 0 nothing was lost, 1 something was, 7 something was not measured "
    "(or a\nseeded bug survived), 2 interrupted: what was found until then is shown and written.",
)
@click.option("--quick", is_flag=True, help="A sample of every campaign: about half a minute.")
@click.option(
    "--campaign",
    "campaigns",
    multiple=True,
    callback=once,
    metavar="NAME",
    help="kill, errors, replay, power_cut, bit_flips, swaps, disk_full, file_limit, writers, "
    "collection, migration or newer_schema; repeatable, all by default.",
)
@click.option(
    "--trials", type=WholeNumber(min=1), metavar="N", help="Most trials of each campaign."
)
@click.option("--seed", default=0, type=WholeNumber(min=0), metavar="N", help="Random choices.")
@click.option(
    "--opener",
    metavar="MODULE:ATTRIBUTE",
    help="Opens another store than our own; called as Store.open is, in processes of their own.",
)
@click.option("--mutants", is_flag=True, help="Also find the seeded bugs: the negative control.")
@click.option(
    "--json",
    "json_file",
    type=NamedPath(),
    metavar="FILE",
    help="Write it all here.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def storage_command(
    quick: bool,
    campaigns: tuple[str, ...],
    trials: int | None,
    seed: int,
    opener: str | None,
    mutants: bool,
    json_file: Path | None,
    quiet: bool,
) -> int:
    """Crash a state store at every point and count what it lost.

    Kills and errors at each write-class system call (strace), power cuts (simulated from a trace,
    and real ones on a loop-mounted ext4 where root allows), flipped bits, cut and swapped files,
    full disks, two writers, collections inside commits, old and newer schemas. A campaign that
    cannot run here is not measured, with the reason.
    """
    from forge_harness.drill.children import problem_of
    from forge_harness.drill.storage import MUTANTS, run_storage
    from forge_harness.drill.target import OWN_STORE, require_opens
    from forge_harness.integration.stops import interrupted_once

    if opener is not None:
        import_from(Path.cwd())
    require_opens(opener or OWN_STORE)
    if opener is not None and (problem := problem_of(opener)):
        raise UsageError(
            f"{problem[0].upper()}{problem[1:].rstrip('.')}. Faults strike processes of their "
            "own, started with `python -S`: have it open one there too."
        )
    check_target(json_file)
    found: list[StorageReport] = []
    # Ended otherwise, it would leave its disks mounted.
    with interrupted_once():
        try:
            with counted(quiet) as tell:
                found.append(
                    run_storage(
                        opener or OWN_STORE,
                        campaigns=campaigns,
                        profile="quick" if quick else "full",
                        seed=seed,
                        trials=trials,
                        mutants=MUTANTS if mutants else (),
                        tell=tell,
                        stopped=found.append,
                    )
                )
        finally:
            # Also where it was interrupted.
            if found:
                _keep(found[0], json_file)
    return _EXITS[found[0].status.value]


_EXITS = {
    "held": ExitCode.PASS,
    "lost": ExitCode.GATE_FAILED,
    "not measured": ExitCode.INCOMPLETE,
}


def _keep(report: StorageReport, json_file: Path | None) -> None:
    try:
        if json_file is not None:
            write_durably(json_file, canonical_json(report.to_json()) + b"\n")
    finally:
        # Last: nobody may read all of it (`| head`), and nothing would be kept.
        _show(report)


def _show(report: StorageReport) -> None:
    from forge_harness.drill.kills import UNREACHED

    from .terminal import coloured, several, table

    heads = ("campaign", "status", "points", "trials", "acked", "lost", "torn", "silent")
    rest = ("unrecov.", "in doubt", "orphans", "open p50", "open max", "s", "seed")
    click.echo(table((*heads, *rest), [_row(campaign) for campaign in report.campaigns]))
    for campaign in report.campaigns:
        if campaign.reason and campaign.reason != UNREACHED:
            word = {"lost": "fail"}.get(campaign.status.value, "warn")
            click.echo(f"{coloured(word, campaign.name)}: {campaign.reason}")
    if report.mutants:
        click.echo("")
        headers = ("seeded bug", "campaign", "status", "trials", "found")
        click.echo(table(headers, [_mutant(mutant) for mutant in report.mutants]))
        click.echo(f"seeded bugs caught: {report.mutants_caught} of {len(report.mutants)}")
    if report.unreached:
        every = len(report.campaigns) + len(report.mutants)
        click.echo(
            f"Not complete: {report.unreached} of {several(every, 'campaign')} had not ended."
        )
    click.echo(f"{report.status.value} ({report.seconds:.0f} s)")


def _row(report: CampaignReport) -> tuple[object, ...]:
    points = f"{report.points_tried}/{report.points}" if report.points else "-"
    return (
        report.name,
        report.status.value,
        points,
        report.trials,
        report.acknowledged,
        report.lost,
        report.torn,
        report.silent,
        report.unrecoverable,
        report.in_doubt,
        report.orphans,
        _milliseconds(report.recovery_p50_s),
        _milliseconds(report.recovery_max_s),
        f"{report.seconds:.1f}",
        report.seed,
    )


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"


def _mutant(report: MutantReport) -> tuple[object, ...]:
    return report.bug, report.campaign, report.status, report.trials, report.reason
