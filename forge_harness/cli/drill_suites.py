"""`forge-harness drill suites`: what the suites find of defects that are seeded on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.canonical import canonical_json
from forge_harness.durable import write_durably
from forge_harness.errors import ExitCode
from forge_harness.paths import resolved_path

from .options import NamedPath, WholeNumber, check_target, examples
from .progress import counted

if TYPE_CHECKING:
    from forge_harness.drill.defect import Defect
    from forge_harness.drill.kills import DefectResult, Power, SuitesReport

_EXITS = {
    "held": ExitCode.PASS,
    "missed": ExitCode.GATE_FAILED,
    "not measured": ExitCode.INCOMPLETE,
}


@click.command(
    "suites",
    epilog=examples(
        "forge-harness drill suites",
        "forge-harness drill suites --stage quantizer --rows",
        "forge-harness drill suites --defect L11_off_by_one --matrix",
        "forge-harness drill suites --json kills.json",
        "forge-harness drill suites --sample 1",
        "forge-harness drill suites --list",
        "forge-harness drill suites --seeds my_seeds.py --suite-path my_checks",
    )
    + "\n\n\b\nExit codes: 0 all were killed and no sound subject was accused, 1 otherwise,\n"
    "7 something was not measured.",
)
@click.option("--stage", "stages", multiple=True, metavar="NAME", help="Seed these stages only.")
@click.option("--suite", "suites", multiple=True, metavar="NAME", help="Drill these suites only.")
@click.option("--check", "checks", multiple=True, metavar="ID", help="Drill these checks only.")
@click.option("--defect", "ids", multiple=True, metavar="ID", help="Seed these defects only.")
@click.option(
    "--sample", type=WholeNumber(min=1), metavar="N", help="Seed N of each stage, by --seed."
)
@click.option(
    "--seeds", metavar="MODULE|FILE", help="Seeds of your own instead of the shipped ones."
)
@click.option("--subject", metavar="SUBJECT", help="What they are seeded in, and differ from.")
@click.option(
    "--suite-path",
    "suite_paths",
    multiple=True,
    type=NamedPath(exists=True),
    metavar="DIR",
    help="Directory of your own checks (repeatable).",
)
@click.option("--matrix", is_flag=True, help="Run all checks of the suite for each defect.")
@click.option("--variants/--no-variants", default=True, help="Also drill sound variants.")
@click.option("--rows", is_flag=True, help="Show each defect.")
@click.option("--list", "only_list", is_flag=True, help="List the seeded defects; run nothing.")
@click.option("--jobs", type=WholeNumber(min=1), metavar="N", help="Processes; one a core.")
@click.option("--seed", default=0, type=WholeNumber(min=0), metavar="N", help="Random choices.")
@click.option("--json", "json_file", type=NamedPath(), metavar="FILE", help="Write it here.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def suites_command(
    stages: tuple[str, ...],
    suites: tuple[str, ...],
    checks: tuple[str, ...],
    ids: tuple[str, ...],
    sample: int | None,
    seeds: str | None,
    subject: str | None,
    suite_paths: tuple[Path, ...],
    matrix: bool,
    variants: bool,
    rows: bool,
    only_list: bool,
    jobs: int | None,
    seed: int,
    json_file: Path | None,
    quiet: bool,
) -> int:
    """Seed defects and count which of them the checks find.

    Each seeded defect is the reference subject with one behaviour changed, after a defect of a
    real project, and is first shown to differ. It is killed when the check that must see it goes
    red and names what is wrong; a crash is no kill. Sound subjects of other kinds measure the
    false alarms. `forge-harness run --subject forge_harness.drill.defects:ID` shows any of them.
    """
    from forge_harness.drill.seeds import load_seeds
    from forge_harness.drill.suites import Own, Selection, run_suites, selected
    from forge_harness.integration.stops import interrupted_once

    selection = Selection(stages, suites, checks, ids, matrix, variants, sample)
    own = Own(seeds, subject, tuple(resolved_path(path) for path in suite_paths))
    chosen = selected(selection, seed, load_seeds(seeds))
    if only_list:
        _list(chosen)
        return ExitCode.PASS
    check_target(json_file)
    found: list[SuitesReport] = []
    with interrupted_once():
        try:
            with counted(quiet) as told:
                tell = None if told is None else partial(told, "subjects")
                found.append(
                    run_suites(
                        selection, own=own, seed=seed, jobs=jobs, tell=tell, stopped=found.append
                    )
                )
        finally:
            # Also where it was interrupted.
            if found:
                _keep(found[0], json_file, rows=rows)
    return _EXITS[found[0].status]


def _keep(report: SuitesReport, json_file: Path | None, *, rows: bool) -> None:
    try:
        if json_file is not None:
            write_durably(json_file, canonical_json(report.to_json()) + b"\n")
    finally:
        # Last: nobody may read all of it (`| head`), and nothing would be kept.
        _show(report, rows=rows)


def _list(defects: Sequence[Defect]) -> None:
    from .terminal import table

    rows = [
        (d.id, str(d.stage), d.subtlety, d.check, f"{d.title} ({d.source or 'our own'})")
        for d in defects
    ]
    click.echo(table(("defect", "stage", "subtlety", "check", "what is wrong (source)"), rows))


def _show(report: SuitesReport, *, rows: bool) -> None:
    from forge_harness.drill.kills import UNREACHED, power_of

    from .terminal import table

    if rows:
        shown = [
            (r.id, r.stage, r.check, r.status.value, f"{r.seconds:.1f}") for r in report.defects
        ]
        click.echo(table(("defect", "stage", "check", "status", "s"), shown))
        click.echo("")
    for by in ("stage", "suite"):
        powers = [*report.power(by), power_of("all", report.defects)]
        click.echo(table((by, "killed", "of", "power [95 %]"), [_power(p) for p in powers]))
        click.echo("")
    for result in report.defects:
        if result.status.value != "killed" and result.reason != UNREACHED:
            _show_missed(result)
    for variant in report.variants:
        for check, reason in variant.alarms.items():
            click.echo(f"false alarm: {check} is red for {variant.id} ({variant.title}): {reason}")
        if variant.problem and variant.problem != UNREACHED:
            click.echo(f"not measured: {variant.id} ({variant.title}): {variant.problem}")
    if report.unreached:
        every = len(report.defects) + len(report.variants)
        click.echo(f"Not complete: {report.unreached} of {every} subjects were not drilled.")
    click.echo(_closing(report))


def _power(power: Power) -> tuple[object, ...]:
    share = f"{100 * power.killed // power.of} %" if power.of else "-"
    # Outwards: an interval that is rounded to a nicer one is another interval.
    interval = f"[{floor(100 * power.low)}, {ceil(100 * power.high)}]"
    return power.name, power.killed, power.of, f"{share} {interval}"


def _show_missed(result: DefectResult) -> None:
    from .terminal import coloured

    word = "warn" if result.status.value == "not measured" else "fail"
    click.echo(f"{coloured(word, result.status.value)}: {result.id} ({result.title})")
    click.echo(f"  {result.reason}")
    click.echo(f"  {result.command}")


def _closing(report: SuitesReport) -> str:
    from forge_harness.drill.kills import power_of

    from .terminal import several

    whole = power_of("all", report.defects)
    high = report.to_json()["false_alarms"]["high"]
    return (
        f"{report.status}: {whole.killed} of {several(whole.of, 'seeded defect')} killed; "
        f"{several(report.alarms, 'false alarm')} in "
        f"{several(report.measured_on_variants, 'check')} of "
        f"{several(len({v.id for v in report.variants}), 'sound subject')} "
        f"(at most {100 * high:.1f} %) ({report.seconds:.0f} s)"
    )
