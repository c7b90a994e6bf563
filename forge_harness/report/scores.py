"""Scores by suite and by component, and where the points went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import floor

from forge_harness.policy import Policy
from forge_harness.record import CheckRecord, RunRecord, SuiteRecord
from forge_harness.report.anchors import check_anchor
from forge_harness.report.model import LossRow, ScoreRow
from forge_harness.report.text import clean, percent
from forge_harness.scoring import WaterfallStep
from forge_harness.scoring.score import credit_of, score
from forge_harness.sums import sum_in_order
from forge_harness.types import Outcome

COMPONENTS = (
    "Phase4Connector",
    "Phase6Preparer",
    "PipelineValidator",
    "StateManager",
    "MLOpsCoordinator",
    "QualityCoordinator",
)
"""In the order of the specification; components of a user's own checks follow."""


def suite_rows(record: RunRecord) -> tuple[ScoreRow, ...]:
    """Returns the suites as the record has them."""
    return tuple(_suite_row(suite, record.checks) for suite in record.suites)


def component_rows(record: RunRecord, policy: Policy) -> tuple[ScoreRow, ...]:
    """Returns the components, each scored over its own checks by the rule of the whole."""
    others = {check.component for check in record.checks} - set(COMPONENTS)
    return tuple(
        _component_row(name, [c for c in record.checks if c.component == name], policy)
        for name in (*COMPONENTS, *sorted(others))
    )


def loss_rows(steps: Sequence[WaterfallStep]) -> tuple[LossRow, ...]:
    """Returns the steps from 100 to the low score, in words."""
    return tuple(
        LossRow(
            label={"check": step.id, "cap": "cap", "floor": step.id}[step.kind],
            anchor=check_anchor(step.id) if step.kind == "check" else None,
            points=f"{step.shown:.2f}",
            remaining=f"{float(step.remaining):.2f}",
            reason=clean(step.reason),
        )
        for step in steps
    )


def _suite_row(suite: SuiteRecord, checks: Sequence[CheckRecord]) -> ScoreRow:
    own = [check for check in checks if check.suite == suite.name]
    return ScoreRow(
        name=clean(suite.name),
        anchor=_first(own, "suites"),
        applicable=_applies(own),
        weight=suite.weight,
        low=suite.low,
        high=suite.high,
        measured_percent=percent(suite.coverage),
        # In our order: a record that was read back has names in that of the alphabet.
        counts=tuple((o, suite.counts[o]) for o in Outcome if suite.counts.get(o)),
        checks=len(own),
        duration_s=suite.duration_s,
    )


def _component_row(name: str, own: Sequence[CheckRecord], policy: Policy) -> ScoreRow:
    scored = score(policy, [credit_of(check) for check in own])
    counted = Counter(check.outcome for check in own)
    return ScoreRow(
        name=clean(name),
        anchor=_first(own, "components"),
        applicable=_applies(own),
        weight=None,
        low=scored.low,
        high=scored.high,
        measured_percent=floor(scored.coverage * 100),
        counts=tuple((outcome, counted[outcome]) for outcome in Outcome if counted[outcome]),
        checks=len(own),
        duration_s=sum_in_order(check.duration_s for check in own),
    )


def _applies(checks: Sequence[CheckRecord]) -> bool:
    return any(check.outcome is not Outcome.NOT_APPLICABLE for check in checks)


def _first(checks: Sequence[CheckRecord], otherwise: str) -> str:
    return check_anchor(checks[0].id) if checks else otherwise
