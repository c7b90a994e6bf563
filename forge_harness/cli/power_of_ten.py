"""`forge-harness power-of-ten`: the adapted ten rules, counted over a source tree."""

from __future__ import annotations

from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_harness.cli.options import (
    FiniteRange,
    NamedPath,
    WholeNumber,
    examples,
    existing,
    json_option,
)
from forge_harness.cli.terminal import echo_json, several, table
from forge_harness.errors import ExitCode

if TYPE_CHECKING:
    from forge_harness.power_of_ten import Assessment

_SHOWN = 50


@click.command(
    "power-of-ten",
    epilog=examples(
        "forge-harness power-of-ten src kernels",
        "forge-harness power-of-ten src --explain 2",
        "forge-harness power-of-ten src --waivers power-of-ten.toml --at-least 0.9",
    ),
)
@click.argument("paths", metavar="[PATH]...", nargs=-1, type=NamedPath())
@click.option(
    "--explain",
    type=WholeNumber(1, 10),
    metavar="RULE",
    help="List the places that break this rule.",
)
@click.option(
    "--waivers",
    "waiver_file",
    type=NamedPath(),
    metavar="FILE",
    help="TOML with [[waiver]]: rule, file, owner, expires, reason; a waived place costs half.",
)
@click.option(
    "--at-least",
    type=FiniteRange(0, 1),
    metavar="SHARE",
    help="Exit 1 when the mean of the categories is below.",
)
@json_option
def power_of_ten_command(
    paths: tuple[Path, ...],
    explain: int | None,
    waiver_file: Path | None,
    at_least: float | None,
    as_json: bool,
) -> int:
    """Count the Power of Ten, adapted, over the Python, C, C++ and CUDA files of PATH, or of here.

    Holzmann's rules are for C; this counts an adaptation, and says what it counted. A rule without
    an opportunity is not applicable, a missing tool or a file that cannot be parsed scores zero.
    """
    from forge_harness.power_of_ten import assess, load_waivers

    existing(waiver_file, "Waiver file")
    waivers = load_waivers(waiver_file) if waiver_file is not None else ()
    found = assess(paths or (Path(),), waivers=waivers)
    if as_json:
        echo_json(_document(found))
    elif explain is not None:
        _explain(found, explain)
    else:
        click.echo(_text(found))
    failed = at_least is not None and (found.mean is None or found.mean < at_least)
    return ExitCode.GATE_FAILED if failed else ExitCode.PASS


def _text(found: Assessment) -> str:
    from forge_harness.power_of_ten.rules import RULES

    rules = [
        (r.rule, _share(r.score), len(r.places), r.opportunities, r.waived, RULES[r.rule])
        for r in found.rules
    ]
    categories = [(c.name, _share(c.score), _share(c.lowest)) for c in found.categories]
    lines = [
        table(("rule", "score", "broken", "of", "waived", "adapted rule"), rules),
        "",
        table(("category", "mean", "lowest rule"), categories),
        "",
        f"{several(found.files, 'file')}: {_share(found.mean)} on average, lowest category "
        f"{_share(found.lowest)} (Power of Ten, adapted).",
    ]
    lines += [f"Not read: {place.sentence()}" for place in found.unreadable]
    lines += [
        f"Rule {m.rule}: {m.tool} did not count ({m.missing}); its share scores zero."
        for r in found.rules
        for m in r.measures
        if m.missing
    ]
    lines += [
        f"Waiver of {w.owner} until {w.expires}: rule {w.rule}, {w.file}" for w in found.waivers
    ]
    lines += [
        f"Waiver of {w.owner} until {w.expires}: rule {w.rule}, {w.file}: "
        f"{'expired, ' if w.expires < date.today() else ''}covers nothing."
        for w in found.idle
    ]
    return "\n".join(lines)


def _explain(found: Assessment, rule: int) -> None:
    score = found.rules[rule - 1]
    for place in score.places[:_SHOWN]:
        click.echo(place.sentence())
    if len(score.places) > _SHOWN:
        click.echo(f"and {len(score.places) - _SHOWN} more (--json lists all)")
    counted = ", ".join(f"{m.name} ({m.tool}): {m.opportunities}" for m in score.measures)
    click.echo(f"Rule {rule}: {_share(score.score)}; counted: {counted or 'nothing'}")


def _document(found: Assessment) -> dict[str, Any]:
    return {
        "roots": [str(root) for root in found.roots],
        "files": found.files,
        "mean": _number(found.mean),
        "lowest": _number(found.lowest),
        "digest": found.digest(),
        "categories": [
            {"name": c.name, "mean": _number(c.score), "lowest": _number(c.lowest)}
            for c in found.categories
        ],
        "rules": [
            {
                "rule": r.rule,
                "score": _number(r.score),
                "opportunities": r.opportunities,
                "waived": r.waived,
                "places": [place.sentence() for place in r.places],
                "measures": [
                    {
                        "name": m.name,
                        "tool": m.tool,
                        "version": m.version,
                        "command": list(m.command),
                        "exit_code": m.exit_code,
                        "opportunities": m.opportunities,
                        "broken": len(m.places),
                        "missing": m.missing,
                    }
                    for m in r.measures
                ],
            }
            for r in found.rules
        ],
        "unreadable": [place.sentence() for place in found.unreadable],
    }


def _share(score: Fraction | None) -> str:
    # Floored, as every score here: 99.96 % is not 100 %.
    return "n/a" if score is None else f"{int(score * 1000) / 10:.1f} %"


def _number(score: Fraction | None) -> float | None:
    return None if score is None else float(score)
