"""The kept runs that lead up to a run, and its own, as points of a trend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from forge_harness.integration.kept_runs import (
    Break,
    History,
    KeptRun,
    breaks,
    breaks_along,
    kept_run,
)
from forge_harness.policy import Policy
from forge_harness.record import RunRecord
from forge_harness.report.anchors import check_anchor
from forge_harness.report.model import Trend, TrendFigure, TrendPoint
from forge_harness.report.text import clean
from forge_harness.types import Outcome

BAD = (Outcome.FAIL, Outcome.ERROR, Outcome.XPASS)
_COMMIT_DIGITS = 8


def trend_of(record: RunRecord, policy: Policy, history: History | None) -> Trend | None:
    """Returns the trend up to a run; None without a history.

    Args:
        record: The run.
        policy: What it was scored with.
        history: The kept runs before it.
    """
    if history is None:
        return None
    own = kept_run(record, policy, "")
    runs = (*history.runs, own)
    along = breaks_along([run.facts for run in runs])
    points = tuple(_point(run, own, broken) for run, broken in zip(runs, along, strict=True))
    compares = [point.compares for point in points]
    return Trend(
        points=points,
        figures=tuple(_figures(runs, compares, {check.id for check in record.checks})),
        left_out=tuple(
            clean(f"{count} {'run' if count == 1 else 'runs'} {why}")
            for why, count in sorted(history.left_out.items())
        ),
    )


def _point(run: KeptRun, own: KeptRun, broken: Sequence[Break]) -> TrendPoint:
    digits = clean(str(run.commit))[:_COMMIT_DIGITS] if run.commit else ""
    return TrendPoint(
        run_id=clean(run.run_id),
        is_this=run is own,
        started_at=clean(run.started_at),
        commit=f"{digits}+" if digits and run.dirty else digits,
        profile=clean(str(run.facts["profile"])),
        state=clean(run.state),
        verdict=run.verdict,
        low=run.score.low,
        high=run.score.high,
        measured=run.coverage,
        failed=sum(run.counts.get(outcome, 0) for outcome in BAD),
        not_measured=run.counts.get(Outcome.NOT_MEASURED, 0),
        duration_s=run.duration_s,
        digest=clean(run.digest),
        breaks=tuple(clean(change.clause()) for change in broken),
        compares=run is own or not breaks(run.facts, own.facts),
        counts=tuple((o, run.counts[o]) for o in Outcome if run.counts.get(o)),
    )


def _figures(
    runs: Sequence[KeptRun], compares: Sequence[bool], checks: set[str]
) -> Iterator[TrendFigure]:
    """Yields the gates by name; values of two units are two figures, as `history export` has it."""
    names = sorted({(name, value.unit) for run in runs for name, value in run.figures.items()})
    for name, unit in names:
        held = [run.figures.get(name) for run in runs]
        values = [f.value if f is not None and f.unit == unit else None for f in held]
        known = [
            value if of_ours else None for value, of_ours in zip(values, compares, strict=True)
        ]
        check = f"gates.{name}"
        yield TrendFigure(
            name=clean(name),
            unit=clean(unit),
            anchor=check_anchor(check) if check in checks else None,
            values=tuple(values),
            before=known[-2] if len(known) > 1 else None,
            comparable=tuple(value for value in known if value is not None),
        )
