"""Runs that are kept, in brief: what a trend shows of each, and where two do not compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from pydantic import BaseModel, ConfigDict

from forge_harness.integration.baselines import (
    RunInBrief,
    changed_facts,
    compared_facts,
    in_brief,
)
from forge_harness.integration.quality_coordinator import QualityCoordinator
from forge_harness.policy import Policy
from forge_harness.record import RunRecord
from forge_harness.types import Outcome

_STRICT = ConfigDict(extra="forbid", frozen=True)
_NAMES_SHOWN = 3
_SERIES = ("subject", "selection")
"""Facts in which all runs of a trend are one. A selection is never a release, and one run of it
between two whole ones would tear the trend apart; other facts are breaks in it."""
MOST_RUNS = 20
"""Runs before the one that is reported: more do not fit a phone's width."""


class KeptFigure(BaseModel):
    """The value of a gate."""

    model_config = _STRICT

    value: float
    unit: str


class KeptRun(RunInBrief):
    """What of a run a trend shows."""

    digest: str
    """Of its run.json, "sha256:...": what is said here can be held against the run itself."""
    duration_s: float | None
    """None of a run that never ended."""
    counts: dict[Outcome, int]
    """Outcome -> checks in scope; without those that are zero."""
    figures: dict[str, KeptFigure]
    """Gate -> value; without those that were not measured."""


class History(BaseModel):
    """The kept runs that lead up to one run."""

    model_config = _STRICT

    runs: tuple[KeptRun, ...] = ()
    """Oldest first."""
    left_out: dict[str, int] = {}
    """Why runs that are kept are not among them -> how many."""


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


def breaks(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[Break]:
    """Returns what keeps a run from being compared with an earlier one, by their facts."""
    return [Break(name, before[name], now[name]) for name in changed_facts(now, before)]


def breaks_along(facts: Sequence[Mapping[str, str | None]]) -> list[list[Break]]:
    """Returns for each run what keeps it from being compared with the one before; first none."""
    return [[] for _ in facts[:1]] + [breaks(before, now) for before, now in pairwise(facts)]


def short_names(names: Sequence[str]) -> str:
    """Returns the first of many names, and how many more there are."""
    more = len(names) - _NAMES_SHOWN
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if more <= 0 else f"{shown} and {more} more"


def short_digest(digest: str) -> str:
    """Returns what tells a digest from others to the eye."""
    return digest.removeprefix("sha256:")[:12]


def kept_run(record: RunRecord, policy: Policy, digest: str) -> KeptRun:
    """Returns a run in brief.

    Args:
        record: A run that verifies.
        policy: What it was scored with.
        digest: Of its run.json.

    Raises:
        ConfigError: The policy has a gate without a unit.
    """
    results = QualityCoordinator(policy).evaluate(record)
    outcomes = [check.outcome for check in record.checks]
    return KeptRun(
        **in_brief(record),
        digest=digest,
        duration_s=_duration(record),
        counts={outcome: outcomes.count(outcome) for outcome in Outcome if outcome in outcomes},
        figures={
            result.gate: KeptFigure(value=result.value, unit=result.unit)
            for result in results
            if result.value is not None
        },
    )


def leading_to(
    record: RunRecord,
    kept: Sequence[KeptRun],
    most: int = MOST_RUNS,
    *,
    without_score: int = 0,
) -> History:
    """Returns the kept runs that a trend up to a run shows.

    Args:
        record: The run.
        kept: Kept runs, oldest first; the run itself may be among them.
        most: How many are shown at most, the newest.
        without_score: How many more were found of which nothing can be shown.
    """
    facts, begun = compared_facts(record), _moment(record.started_at)
    left_out = {"without a score: unfinished, damaged or not verified": without_score}
    shown: list[KeptRun] = []
    for run in kept:
        if run.run_id == record.run_id:
            continue
        if run.digest in (other.digest for other in shown):
            _count(left_out, "kept more than once")
        elif any(run.facts[name] != facts[name] for name in _SERIES):
            _count(left_out, "of another subject or selection")
        elif _moment(run.started_at) > begun:
            _count(left_out, "began later")
        else:
            shown.append(run)
    left_out["older than these"] = max(len(shown) - most, 0)
    counted = {why: count for why, count in left_out.items() if count}
    return History(runs=tuple(shown[-most:]), left_out=counted)


def _count(left_out: dict[str, int], why: str) -> None:
    left_out[why] = left_out.get(why, 0) + 1


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _duration(record: RunRecord) -> float | None:
    if record.finished_at is None:
        return None
    return (_moment(record.finished_at) - _moment(record.started_at)).total_seconds()


def _short(what: str, value: str | None) -> str:
    if value is None:
        return "not known"
    return short_digest(value) if what == "policy" else short_names(value.split(", "))
