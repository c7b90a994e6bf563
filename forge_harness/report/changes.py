"""What changed against a baseline run."""

from __future__ import annotations

from collections.abc import Iterator

from forge_harness.integration.baselines import AcceptedRun, Baseline, compared_facts
from forge_harness.integration.kept_runs import breaks
from forge_harness.integration.quality_coordinator import GateResult, QualityCoordinator
from forge_harness.policy import Policy
from forge_harness.record import RunRecord
from forge_harness.report.anchors import check_anchor
from forge_harness.report.model import (
    BaselineRun,
    Change,
    Changes,
    Move,
    MovedValue,
    Uncompared,
)
from forge_harness.report.text import clean, number, percent
from forge_harness.types import Direction, Outcome

BAD = frozenset({Outcome.FAIL, Outcome.ERROR, Outcome.XPASS})
GOOD = frozenset({Outcome.PASS, Outcome.WARN, Outcome.FLAKY})
SIDES = {
    "newly_failing": "Newly failing",
    "fixed": "Fixed",
    "newly_not_measured": "Newly not measured",
    "newly_measured": "Newly measured",
    "otherwise_changed": "Otherwise changed",
}
"""The lists of `Changes` that a changed check is in one of, in the order they are shown."""
_MISSING = Outcome.NOT_MEASURED
_WORDS = {Direction.AT_LEAST: "at least", Direction.AT_MOST: "at most"}


def changes_since(record: RunRecord, policy: Policy, baseline: AcceptedRun | None) -> Changes:
    """Returns the checks that changed and the values that moved since the baseline.

    Checks of another version have another meaning and do not compare. Values are compared only
    between runs of one machine class, policy, subject and profile, and are within their noise as
    far as the policy's `[thresholds.baseline]` allows for it.
    """
    if baseline is None:
        return Changes(baseline=None, refusal="")
    coordinator = QualityCoordinator(policy)
    if isinstance(baseline, RunRecord):
        baseline = coordinator.baseline_of(baseline)
    compared = coordinator.compare_baseline(record, baseline)
    sides = _by_side(record, baseline)
    then = {"score": float(baseline.score.low), **baseline.gates}
    return Changes(
        baseline=clean(baseline.run_id),
        refusal=clean(compared.reason),
        run=_described(baseline),
        breaks=tuple(clean(b.clause()) for b in breaks(baseline.facts, compared_facts(record))),
        newly_failing=sides["newly_failing"],
        fixed=sides["fixed"],
        newly_not_measured=sides["newly_not_measured"],
        newly_measured=sides["newly_measured"],
        otherwise_changed=sides["otherwise_changed"],
        uncompared=tuple(_uncompared(record, baseline)),
        values=tuple(_moved(row, then.get(row.gate)) for row in compared.rows),
        regressions=tuple(clean(row.reason) for row in compared.regressions),
    )


def side_of(before: Outcome, after: Outcome) -> str:
    """Returns the one of SIDES that a check is in whose outcome was another."""
    if after in BAD and before not in BAD:
        return "newly_failing"
    if before in BAD and after in GOOD:
        return "fixed"
    if after is _MISSING:
        return "newly_not_measured"
    if before is _MISSING and after is not Outcome.NOT_APPLICABLE:
        return "newly_measured"
    return "otherwise_changed"


def _by_side(record: RunRecord, baseline: Baseline) -> dict[str, tuple[Change, ...]]:
    """Returns the checks of both runs whose outcome changed, in catalogue order."""
    found: dict[str, list[Change]] = {side: [] for side in SIDES}
    for check in record.checks:
        then = baseline.checks.get(check.id)
        if then is None or then.version != check.version or then.outcome is check.outcome:
            continue
        anchor = check_anchor(check.id)
        change = Change(check=check.id, anchor=anchor, before=then.outcome, after=check.outcome)
        found[side_of(then.outcome, check.outcome)].append(change)
    return {side: tuple(changes) for side, changes in found.items()}


def _uncompared(record: RunRecord, baseline: Baseline) -> Iterator[Uncompared]:
    ours = {check.id for check in record.checks}
    for check in record.checks:
        then, now = baseline.checks.get(check.id), f"{_word(check.outcome)} now"
        if then is None:
            why = f"not in the baseline, {now}"
        elif then.version != check.version:
            why = (
                f"another meaning: version {then.version} in the baseline, {_word(then.outcome)}; "
                f"version {check.version}, {now}"
            )
        else:
            continue
        yield Uncompared(check=check.id, anchor=check_anchor(check.id), why=why)
    for name in sorted(baseline.checks.keys() - ours):
        why = f"not in this run, {_word(baseline.checks[name].outcome)} in the baseline"
        yield Uncompared(check=clean(name), anchor=None, why=why)


def _word(outcome: Outcome) -> str:
    return outcome.replace("_", " ")


def _described(baseline: Baseline) -> BaselineRun:
    accepted = baseline.acceptance
    until = f", until {accepted.expires}" if accepted and accepted.expires else ""
    return BaselineRun(
        run_id=clean(baseline.run_id),
        started_at=clean(baseline.started_at),
        commit=clean(baseline.commit or ""),
        verdict=baseline.verdict,
        low=baseline.score.low,
        high=baseline.score.high,
        measured_percent=percent(baseline.coverage),
        acceptance=""
        if accepted is None
        else clean(
            f"accepted on {accepted.accepted_on}{until} by {accepted.owner}: {accepted.reason}"
        ),
        outcomes=tuple(
            (clean(name), check.version, check.outcome)
            # By name: a baseline that was read back has them in that order.
            for name, check in sorted(baseline.checks.items())
        ),
        unscored=tuple(map(clean, baseline.unscored)),
        uncollected=tuple(map(clean, baseline.uncollected)),
    )


def _moved(row: GateResult, before: float | None) -> MovedValue:
    """Returns one compared value in words."""
    after = row.value
    is_judged = row.outcome is not _MISSING
    difference = "" if before is None or after is None else f"{after - before:+.4g}"
    return MovedValue(
        name=row.gate,
        anchor="suites" if row.gate == "score" else check_anchor(f"gates.{row.gate}"),
        unit=clean(row.unit),
        before="not measured" if before is None else number(before),
        after="not measured" if after is None else number(after),
        difference=difference,
        allowed=", ".join(f"{_WORDS[s.direction]} {number(s.limit)}" for s in row.limits)
        if is_judged
        else "",
        move=_move(row, before) if is_judged else "not_judged",
        reason=clean(row.reason),
    )


def _move(row: GateResult, before: float | None) -> Move:
    if row.outcome in (Outcome.FAIL, Outcome.ERROR):
        return "worse"
    return "better" if _is_better(row, before) else "within"


def _is_better(row: GateResult, before: float | None) -> bool:
    """Whether a value is further on the good side than it might have been on the bad one."""
    if before is None or row.value is None or len(row.limits) != 1:
        return False
    (side,) = row.limits
    sign = 1 if side.direction is Direction.AT_LEAST else -1
    return sign * (row.value - before) > abs(before - side.limit)
