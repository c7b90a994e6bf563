"""`forge-harness explain`: which checks cost how many points."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_harness.cli.gate import admitted
from forge_harness.cli.options import WholeNumber, examples, json_option, run_dir_argument
from forge_harness.cli.summary import scope_sentence, score_sentence
from forge_harness.cli.terminal import echo_json, printable, several, table

if TYPE_CHECKING:
    from forge_harness.scoring import Repair, WaterfallStep


@click.command("explain", epilog=examples("forge-harness explain first --limit 10"))
@run_dir_argument
@json_option
@click.option(
    "--limit",
    type=WholeNumber(min=0),
    default=20,
    show_default=True,
    help="Rows to show; 0 shows all. Totals always cover all.",
)
@click.option(
    "--target",
    type=WholeNumber(0, 100),
    default=80,
    show_default=True,
    help="Score the way back leads to.",
)
def explain_command(directory: Path, as_json: bool, limit: int, target: int) -> None:
    """Show the way from 100 points down to the score of the run in DIR, and a way back.

    The run must verify, as it must for `gate`: points of a forged record explain nothing.
    """
    from forge_harness.scoring import policy_line, waterfall, way_back

    record, policy = admitted(directory)
    steps = waterfall(record, policy)
    repairs = way_back(record, policy, target=target)
    if as_json:
        echo_json(
            {
                "score": {"low": record.score.low, "high": record.score.high},
                "coverage": record.coverage,
                "policy_digest": record.policy_digest,
                "steps": [_step(step) for step in steps],
                "way_back": {"target": target, "repairs": [_repair(r) for r in repairs]},
            }
        )
        return
    click.echo(f"{score_sentence(record)}\n{scope_sentence(record)}")
    click.echo(f"{printable(policy_line(policy))}\n")
    click.echo(_waterfall_table(steps, limit or len(steps)))
    click.echo(_way_back_text(repairs, record.score.low, target, limit or len(repairs)))


def _step(step: WaterfallStep) -> dict[str, Any]:
    return {
        "kind": step.kind,
        "id": step.id,
        "suite": step.suite,
        "severity": step.severity,
        "outcome": step.outcome,
        "points": str(step.points),
        "shown": str(step.shown),
        "remaining": str(step.remaining),
        "reason": step.reason,
    }


def _repair(repair: Repair) -> dict[str, Any]:
    return {
        "check": repair.check,
        "severity": repair.severity,
        "outcome": repair.outcome,
        "points": str(repair.points),
        "low_after": repair.low_after,
    }


def _waterfall_table(steps: Sequence[WaterfallStep], limit: int) -> str:
    folded = [step for step in steps[limit:] if step.kind == "check"]
    rows = [(step.shown, *_words(step)) for step in steps[:limit]]
    if folded:
        lost = sum((step.shown for step in folded), Decimal(0))
        rows.append((lost, several(len(folded), "more check"), "", "", "--limit 0 shows them"))
    rows += [(step.shown, *_words(step)) for step in steps[limit:] if step.kind != "check"]
    left = Decimal(100)
    lines: list[tuple[str, ...]] = [("", "100.00", "every check passes", "", "", "")]
    for lost, *words in rows:
        left -= lost
        lines.append((f"-{lost}" if lost else "0.00", f"{left:.2f}", *words))
    return table(("points", "left", "what", "severity", "outcome", "reason"), lines)


def _words(step: WaterfallStep) -> tuple[str, str, str, str]:
    outcome = (step.outcome or step.kind).replace("_", " ")
    return step.id, str(step.severity or ""), outcome, step.reason


def _way_back_text(repairs: Sequence[Repair], low: int, target: int, limit: int) -> str:
    if low >= target:
        return f"\nThe score is at {target} or above."
    if not repairs or repairs[-1].low_after < target:
        return f"\nNo repair of checks leads to {target}."
    rows = [
        (place, repair.check, repair.severity, repair.outcome.replace("_", " "), repair.low_after)
        for place, repair in enumerate(repairs[:limit], 1)
    ]
    text = f"\nA short way to {target}: bring these checks to a pass, in this order.\n\n"
    text += table(("", "check", "severity", "outcome", "score then"), rows)
    more = len(repairs) - len(rows)
    return f"{text}\n... and {more} more" if more else text
