"""What `history` prints: the trend with its breaks, scores before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from forge_harness.cli.summary import percent
from forge_harness.cli.terminal import printable, table

if TYPE_CHECKING:
    from forge_harness.cli.stored_runs import StoredRuns
    from forge_harness.policy import Policy
    from forge_harness.record import RunRecord
    from forge_harness.scoring import Rescored

_HEADERS = ("started", "run", "commit", "scope", "verdict", "score", "measured", "policy")
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Break:
    """One thing a run has not in common with the run before it."""

    what: str
    before: str | None
    now: str | None

    def clause(self) -> str:
        """Returns "profile quick -> full"."""
        if self.before == self.now:  # a record that says nothing is like no other
            return f"{self.what} not known"
        return f"{self.what} {_short(self.what, self.before)} -> {_short(self.what, self.now)}"


def breaks_between(found: StoredRuns) -> list[list[Break]]:
    """Returns for each run what keeps it from being compared with the one before."""
    from forge_harness.integration.baselines import changed_facts, compared_facts

    records = [run.record for run in found.runs]
    breaks: list[list[Break]] = [[] for _ in records]
    for place, (before, now) in enumerate(pairwise(records), 1):
        then, here = compared_facts(before), compared_facts(now)
        changed = changed_facts(here, then)
        breaks[place] = [Break(name, then[name], here[name]) for name in changed]
    return breaks


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


def _short(what: str, value: str | None) -> str:
    if value is None:
        return "not known"
    if what == "policy":
        return _short_digest(value)
    names = value.split(", ")
    more = len(names) - _NAMES_SHOWN
    return value if more <= 0 else f"{', '.join(names[:_NAMES_SHOWN])} and {more} more"


def _short_digest(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _cells(record: RunRecord) -> tuple[str, ...]:
    unfinished = "" if record.state == "finished" else f" ({record.state})"
    return (
        record.started_at,
        record.run_id,
        _commit(record),
        _scope(record),
        f"{record.verdict}{unfinished}",
        _interval(record),
        percent(record.coverage),
        _short_digest(record.policy_digest),
    )


def _commit(record: RunRecord) -> str:
    commit = record.environment.get("git_commit")
    return (
        f"{str(commit)[:8]}{'+' if record.environment.get('git_dirty') else ''}" if commit else "-"
    )


def _scope(record: RunRecord) -> str:
    scope = record.scope
    if scope.shard:
        return f"{scope.profile} shard {scope.shard}"
    selected = ", ".join([*scope.suites, *scope.checks])
    return f"{scope.profile}: {_short('selection', selected)}" if selected else scope.profile.value


def _interval(record: RunRecord) -> str:
    low, high = record.score.low, record.score.high
    return str(low) if low == high else f"{low}-{high}"


def refused_lines(found: StoredRuns) -> list[str]:
    """Returns the runs of which no score is shown, and why; nothing when there is none."""
    if not found.refused:
        return []
    count = "1 run" if len(found.refused) == 1 else f"{len(found.refused)} runs"
    return ["", f"Without a score: {count}", *(f"  {run.line()}" for run in found.refused)]


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
