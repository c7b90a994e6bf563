"""What a CTRF document says of other runs: which one is the baseline, and rates over runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from forge_harness.report.changes import side_of
from forge_harness.report.identity import run_guid
from forge_harness.report.model import BaselineRun, CheckRow, Report
from forge_harness.sums import sum_in_order
from forge_harness.types import Outcome

EXTRA = "forge.harness"
"""Key of all we add; the specification wants one with a prefix, the same in all places."""
STATUS = {
    Outcome.PASS: "passed",
    Outcome.WARN: "passed",
    Outcome.FLAKY: "passed",
    Outcome.FAIL: "failed",
    Outcome.ERROR: "failed",
    Outcome.XPASS: "failed",
    Outcome.XFAIL: "skipped",
    Outcome.NOT_APPLICABLE: "skipped",
    Outcome.NOT_MEASURED: "other",
}
_DIGITS = 6
_OF = "checks that apply; what is not measured is of them, and has not passed"
_Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Rates:
    """Shares of the checks that apply; None where none does."""

    passed: float | None
    failed: float | None
    flaky: float | None


def baseline_reference(report: Report) -> _Values:
    """Returns the root's `baseline`; nothing without one.

    When its own document was made the baseline does not say, so it has no `timestamp`; the id is
    that of the document which speaks of no other run.
    """
    changes = report.changes
    run = changes.run
    if run is None:
        return {}
    facts = {
        "runId": run.run_id,
        "startedAt": run.started_at,
        "verdict": run.verdict.value,
        "score": {"low": run.low, "high": run.high},
        "measured_percent": run.measured_percent,
        "acceptance": run.acceptance,
        "comparable": not changes.refusal,
        "reason": changes.refusal,
        "breaks": list(changes.breaks),
    }
    return {
        "baseline": {
            "reportId": run_guid(run.run_id),
            "source": f"run {run.run_id}",
            **({"commit": run.commit} if run.commit else {}),
            "extra": {EXTRA: facts},
        }
    }


def run_insights(report: Report) -> _Values:
    """Returns the root's `insights`; nothing without a baseline and a history.

    Of the kept runs those count that compare with this one. What a baseline does not keep (its
    duration) has no `baseline`, and a baseline that does not compare has no numbers at all. There
    is no p95 of durations: so few runs have none.
    """
    if report.changes.run is None and report.trend is None:
        return {}
    counts, durations = _analyzed(report)
    values = _deltas(_rates(_added(counts)), _baseline_rates(report))
    known = [seconds for seconds in durations if seconds is not None]
    if known and len(known) == len(durations):
        values["averageRunDuration"] = {"current": round(1000 * sum_in_order(known) / len(known))}
    values["runsAnalyzed"] = len(counts)
    values["extra"] = {EXTRA: {"of": _OF, **_left_out(report, len(counts))}}
    return {"insights": values}


def insights_by_test(report: Report) -> dict[str, _Values]:
    """Returns check id -> `insights` of its test: its outcome in a baseline that compares.

    Their rates are those of this run alone, so they are left out where the root's are over several.
    """
    run = report.changes.run
    if run is None or report.changes.refusal:
        return {}
    alone = len(_analyzed(report)[0]) == 1
    before = {(name, version): outcome for name, version, outcome in run.outcomes}
    pairs = ((check, before.get((check.id, check.version))) for check in report.checks)
    return {check.id: _of_test(check, then, alone) for check, then in pairs if then is not None}


def _of_test(check: CheckRow, then: Outcome, alone: bool) -> _Values:
    changed = "" if then is check.outcome else side_of(then, check.outcome)
    facts = {"baselineOutcome": then.value, "change": changed}
    deltas = _deltas(_rates({check.outcome: 1}), _rates({then: 1})) if alone else {}
    return {**deltas, "extra": {EXTRA: facts}}


def _analyzed(report: Report) -> tuple[list[Mapping[Outcome, int]], list[float | None]]:
    """Returns outcomes and durations of the runs that compare with this one, itself included."""
    if report.trend is None:
        return [Counter(check.outcome for check in report.checks)], []
    points = [point for point in report.trend.points if point.compares]
    return [dict(point.counts) for point in points], [point.duration_s for point in points]


def _added(counts: Iterable[Mapping[Outcome, int]]) -> Counter[Outcome]:
    total: Counter[Outcome] = Counter()
    for count in counts:
        total.update(count)
    return total


def _rates(counts: Mapping[Outcome, int]) -> _Rates:
    applicable = sum(n for outcome, n in counts.items() if outcome is not Outcome.NOT_APPLICABLE)
    if not applicable:
        return _Rates(None, None, None)
    statuses: Counter[str] = Counter()
    for outcome, n in counts.items():
        statuses[STATUS[outcome]] += n
    shares = statuses["passed"], statuses["failed"], counts.get(Outcome.FLAKY, 0)
    return _Rates(*(round(n / applicable, _DIGITS) for n in shares))


def _baseline_rates(report: Report) -> _Rates:
    run: BaselineRun | None = report.changes.run
    if run is None or report.changes.refusal:
        return _Rates(None, None, None)
    return _rates(Counter(outcome for _, _, outcome in run.outcomes))


def _deltas(now: _Rates, then: _Rates) -> _Values:
    pairs = {
        "passRate": (now.passed, then.passed),
        "failRate": (now.failed, then.failed),
        "flakyRate": (now.flaky, then.flaky),
    }
    return {name: delta for name, pair in pairs.items() if (delta := _delta(*pair))}


def _delta(current: float | None, baseline: float | None) -> _Values:
    known = {"current": current, "baseline": baseline}
    values = {name: value for name, value in known.items() if value is not None}
    if current is not None and baseline is not None:
        values["change"] = round(current - baseline, _DIGITS)
    return values


def _left_out(report: Report, analyzed: int) -> _Values:
    if report.trend is None:
        return {}
    return {"doNotCompare": len(report.trend.points) - analyzed}
