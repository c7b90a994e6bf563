"""What `history` prints: the trend with its breaks, scores before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from forge_harness.cli.summary import percent
from forge_harness.cli.terminal import printable, several, table

if TYPE_CHECKING:
    from forge_harness.cli.stored_runs import StoredRuns
    from forge_harness.integration.kept_runs import Break
    from forge_harness.policy import Policy
    from forge_harness.record import RunRecord
    from forge_harness.scoring import Rescored

_HEADERS = ("started", "run", "commit", "scope", "verdict", "score", "measured", "policy")


def breaks_between(found: StoredRuns) -> list[list[Break]]:
    """Returns for each run what keeps it from being compared with the one before."""
    from forge_harness.integration.baselines import compared_facts
    from forge_harness.integration.kept_runs import breaks_along

    return breaks_along([compared_facts(run.record) for run in found.runs])


def trend(found: StoredRuns, breaks: Sequence[Sequence[Break]]) -> list[str]:
    """Returns one line a run, and one above each run that does not compare with the last."""
    if not found.runs:
        return ["No run verifies."]
    cells = [_cells(run.record) for run in found.runs]
    # The last column has no spaces to be wrapped at: a row is a line.
    head, *rows = table(_HEADERS, cells).splitlines()
    lines = [head]
    for row, broken in zip(rows, breaks, strict=True):
        if broken:
            changes = "; ".join(printable(change.clause()) for change in broken)
            lines.append(f"--- {changes}: scores above and below do not compare ---")
        lines.append(row)
    return lines


def _cells(record: RunRecord) -> tuple[str, ...]:
    from forge_harness.integration.kept_runs import short_digest

    unfinished = "" if record.state == "finished" else f" ({record.state})"
    return (
        record.started_at,
        record.run_id,
        _commit(record),
        _scope(record),
        f"{record.verdict}{unfinished}",
        _interval(record),
        percent(record.coverage),
        short_digest(record.policy_digest),
    )


def _commit(record: RunRecord) -> str:
    commit = record.environment.get("git_commit")
    return (
        f"{str(commit)[:8]}{'+' if record.environment.get('git_dirty') else ''}" if commit else "-"
    )


def _scope(record: RunRecord) -> str:
    from forge_harness.integration.kept_runs import short_names

    scope = record.scope
    if scope.shard:
        return f"{scope.profile} shard {scope.shard}"
    selected = [*scope.suites, *scope.checks]
    return f"{scope.profile}: {short_names(selected)}" if selected else scope.profile.value


def _interval(record: RunRecord) -> str:
    low, high = record.score.low, record.score.high
    return str(low) if low == high else f"{low}-{high}"


def refused_lines(found: StoredRuns) -> list[str]:
    """Returns the runs of which no score is shown, and why; nothing when there is none."""
    runs = [run.line() for run in found.refused if run.is_run]
    others = [f"\n{place.line()}" for place in found.refused if not place.is_run]
    if not runs:
        return others
    named = (f"  {line}" for line in runs)
    return ["", f"Without a score: {several(len(runs), 'run')}", *named, *others]


def rescored_lines(found: StoredRuns, again: Sequence[Rescored], policy: Policy) -> list[str]:
    """Returns verdict and score of each run before and after, then the notes on each."""
    pairs = list(zip((run.record for run in found.runs), again, strict=True))
    cells = [
        (
            before.run_id,
            f"{before.verdict} -> {done.record.verdict}",
            f"{_interval(before)} -> {_interval(done.record)}",
        )
        for before, done in pairs
    ]
    lines = [table(("run", "verdict", "score"), cells)] if cells else ["No run verifies."]
    for before, done in pairs:
        if done.notes:
            lines += ["", f"{printable(before.run_id)}:"]
            lines += [f"  - {printable(note)}" for note in done.notes]
    return [*lines, "", f"Policy: {policy.digest}"]
