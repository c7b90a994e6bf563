"""The terminal summary of a session with checks."""

from __future__ import annotations

from collections import Counter

import pytest

from forge_harness._pytest.keeper import Keeper, shown
from forge_harness.record import CheckRecord
from forge_harness.types import Outcome, Verdict

_LISTED = 10
_BAD = (Outcome.FAIL, Outcome.ERROR, Outcome.XPASS)
_COLOURS = {Verdict.PASS: "green", Verdict.FAIL: "red"}


def write_summary(terminal: pytest.TerminalReporter, keeper: Keeper) -> None:
    """Prints score, coverage, verdict, what failed and how to keep the run."""
    record = keeper.record
    assert record is not None
    terminal.section("forge-harness")
    counts = Counter(check.outcome for check in record.checks)
    bad = [check for check in record.checks if check.outcome in _BAD]
    score = record.score
    terminal.write_line(
        f"Integration score {score.low} (at most {score.high}), "
        # Floored; the addend undoes the binary error of four digits (0.29 * 100 is 28.99...).
        f"{int(record.coverage * 100 + 1e-9)} % measured"
    )
    colour = {_COLOURS.get(record.verdict, "yellow"): True, "bold": True}
    terminal.write_line(f"Verdict {record.verdict}: {_reason(record.verdict_reasons)}", **colour)
    terminal.write_line(
        f"{record.scope.in_scope} of {record.scope.total} checks in scope: "
        f"{counts[Outcome.PASS]} passed, {len(bad)} failed, "
        f"{counts[Outcome.NOT_MEASURED]} not measured; policy {record.policy_digest[:19]}"
    )
    for item in record.unscored_items[:_LISTED]:
        if item.hides_checks:
            terminal.write_line(f"  {item.nodeid}: {item.reason}; what it checks is not measured")
    for check in bad[:_LISTED]:
        terminal.write_line(_line(check))
    if len(bad) > _LISTED:
        terminal.write_line(f"  and {len(bad) - _LISTED} more")
    if keeper.path is None:
        terminal.write_line("Keep this run with --forge-run-dir DIR.")
    else:
        where = shown(keeper.path)
        terminal.write_line(
            f"Kept in {where}. Pytest's exit code is not the gate: forge-harness gate {where}"
        )


def _reason(reasons: list[str]) -> str:
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return f"{reasons[0]}{more}" if reasons else "all of it holds"


def _line(check: CheckRecord) -> str:
    return f"  {check.outcome.value:5} {check.id} ({check.severity}): {check.reason}"
