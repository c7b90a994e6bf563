"""`forge-harness compare`: what changed between two runs; never gates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_harness.cli.gate import accepted, admitted
from forge_harness.cli.github import text_without_commands
from forge_harness.cli.options import NamedPath, examples, json_option
from forge_harness.cli.summary import score_sentence
from forge_harness.cli.terminal import echo_json, printable, table
from forge_harness.errors import ExitCode
from forge_harness.types import Outcome

if TYPE_CHECKING:
    from forge_harness.integration.baselines import Baseline
    from forge_harness.integration.quality_coordinator import GateResult
    from forge_harness.record import RunRecord
    from forge_harness.report.model import Change, Changes

_DIRECTORY = NamedPath()


@click.command(
    "compare",
    epilog=examples(
        "forge-harness compare accepted first", "forge-harness compare forge-baseline.json first"
    ),
)
@click.argument("accepted_at", metavar="BASELINE", type=_DIRECTORY)
@click.argument("directory", metavar="DIR", type=_DIRECTORY)
@json_option
def compare_command(accepted_at: Path, directory: Path, as_json: bool) -> int:
    """Show what changed from the run BASELINE to the run in DIR.

    BASELINE is the directory of a run or the file of `baseline accept`; runs must verify. Checks
    are compared by outcome; score and gates by value, which needs runs of one machine class,
    policy, subject, profile, selection and declaration: the exit code is 9 otherwise, and 0
    whatever changed. `gate --baseline` gates.
    """
    from forge_harness.integration.quality_coordinator import QualityCoordinator
    from forge_harness.report.changes import SIDES, changes_since

    baseline = accepted(accepted_at)
    record, policy = admitted(directory)
    coordinator = QualityCoordinator(policy)
    found = coordinator.compare_baseline(record, baseline)
    before = {"score": float(baseline.score.low), **baseline.gates}
    changes = changes_since(record, policy, baseline)
    if as_json:
        echo_json(
            {
                "baseline": _run(baseline),
                "run": _run(record),
                "comparable": found.comparable,
                "reason": found.reason,
                "values": [_value(row, before.get(row.gate)) for row in found.rows],
                **{side: [_change(c) for c in getattr(changes, side)] for side in SIDES},
                "uncompared": [{"check": c.check, "why": c.why} for c in changes.uncompared],
            }
        )
    else:
        click.echo(_text(record, baseline, changes, found.rows, before, found.reason))
    return ExitCode.PASS if found.comparable else ExitCode.BASELINE_MISSING


def _run(record: RunRecord | Baseline) -> dict[str, Any]:
    return {
        "run_id": record.run_id,
        "verdict": record.verdict,
        "score": {"low": record.score.low, "high": record.score.high},
        "coverage": record.coverage,
        "policy_digest": record.policy_digest,
    }


def _value(row: GateResult, before: float | None) -> dict[str, Any]:
    return {
        "name": row.gate,
        "unit": row.unit,
        "baseline": before,
        "value": row.value,
        "limits": [{"direction": side.direction, "limit": side.limit} for side in row.limits],
        "outcome": row.outcome,
        "reason": row.reason,
    }


def _change(change: Change) -> dict[str, Any]:
    return {"check": change.check, "before": change.before, "after": change.after}


def _text(
    record: RunRecord,
    baseline: Baseline,
    changes: Changes,
    rows: tuple[GateResult, ...],
    before: dict[str, float],
    refusal: str,
) -> str:
    from forge_harness.report.changes import SIDES

    lines = [
        f"{title} {printable(run.run_id)}: {run.verdict}. {score_sentence(run)}"
        for title, run in (("Baseline", baseline), ("Run     ", record))
    ]
    if refusal:
        lines += ["", f"Values do not compare: {printable(refusal)}."]
    else:
        cells = [_cells(row, before.get(row.gate)) for row in rows]
        lines += ["", table(("value", "unit", "baseline", "now", "allowed", "outcome"), cells)]
    for side, words in SIDES.items():
        found: tuple[Change, ...] = getattr(changes, side)
        lines += ["", f"{words}: {len(found) or 'none'}"]
        lines += [f"  {printable(c.check)}: {c.before.value} -> {c.after.value}" for c in found]
    if changes.uncompared:
        lines += ["", f"Not compared: {len(changes.uncompared)}"]
        lines += [f"  {printable(c.check)}: {printable(c.why)}" for c in changes.uncompared]
    # Gates and node ids are named by whoever made the runs, or the file under review.
    return text_without_commands(lines)


def _cells(row: GateResult, before: float | None) -> tuple[str, ...]:
    sides = {"at_least": ">=", "at_most": "<="}
    allowed = ", ".join(f"{sides[side.direction]} {side.limit:.6g}" for side in row.limits)
    shown = ("" if number is None else f"{number:.6g}" for number in (before, row.value))
    is_judged = row.value is None or row.outcome is not Outcome.NOT_MEASURED
    outcome = row.outcome.value.replace("_", " ") if is_judged else "not judged"
    return (row.gate, row.unit, *shown, allowed, outcome)
