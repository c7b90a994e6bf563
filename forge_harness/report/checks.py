"""Check records -> the rows a report shows."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping

from forge_harness.evidence import satisfied
from forge_harness.record import CheckItem, CheckRecord, EvidenceRecord, ItemRecord
from forge_harness.report.anchors import check_anchor, evidence_anchor
from forge_harness.report.model import CheckRow, EvidenceRow, ItemRow, Samples, State
from forge_harness.report.text import clean, expectation, number, with_unit
from forge_harness.types import Direction, Level

_ARTIFACT = re.compile(r"evidence/sha256/[0-9a-f]{64}")


def check_row(check: CheckRecord, points_lost: Mapping[str, str]) -> CheckRow:
    """Returns a check with its items and evidence.

    Args:
        check: The record.
        points_lost: Check id -> points of 100 it cost.
    """
    return CheckRow(
        anchor=check_anchor(check.id),
        id=check.id,
        title=clean(check.title),
        suite=clean(check.suite),
        component=clean(check.component),
        severity=check.severity,
        version=check.version,
        outcome=check.outcome,
        reason=clean(check.reason),
        credit=credit(check),
        points_lost=points_lost.get(check.id, ""),
        duration_s=check.duration_s,
        command=clean(check.command),
        evidence=tuple(
            evidence_row(check.id, index, evidence) for index, evidence in enumerate(check.evidence)
        ),
        items=tuple(item_row(item) for item in check.items),
    )


def credit(check: CheckRecord) -> str:
    """Returns the credit of a check: one fraction, or both ends of its interval."""
    low, high = check.credit_low, check.credit_high
    return low if low == high else f"{low} to {high}"


def item_row(item: CheckItem | ItemRecord) -> ItemRow:
    """Returns one pytest item."""
    return ItemRow(
        nodeid=clean(item.nodeid),
        outcome=item.outcome,
        reason=clean(item.reason),
        duration_s=item.duration_s,
        attempts=item.attempts,
        log=clean(item.log or "", lines=True),
        warnings=tuple(clean(warning) for warning in item.warnings),
    )


def evidence_row(check: str, index: int, evidence: EvidenceRecord) -> EvidenceRow:
    """Returns one measured value beside its limit."""
    value, state = evidence.value, _state(evidence)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    exact = state in ("warn", "fail") and _reads_the_same(value, evidence.limit)
    return EvidenceRow(
        anchor=evidence_anchor(check, index),
        name=clean(evidence.name),
        actual=with_unit(number(value, exact=exact), evidence.unit),
        expected=expectation(evidence.limit, evidence.direction, evidence.unit, exact=exact),
        state=state,
        reason=clean(evidence.reason),
        item=clean(evidence.item),
        samples=_samples(evidence.samples),
        artifact=_linkable(evidence.artifact),
        value=float(value) if is_number else None,
        unit=clean(evidence.unit),
    )


def _reads_the_same(value: object, limit: object) -> bool:
    """Whether a value that missed its limit could not be told from it: "0.99, at least 0.99"."""
    limits = limit if isinstance(limit, list) else [limit]
    return number(value) in map(number, limits)


def _linkable(artifact: str | None) -> str | None:
    """Returns the name of a stored file; a forged record could name any address."""
    return artifact if artifact and _ARTIFACT.fullmatch(artifact) else None


def _state(evidence: EvidenceRecord) -> State:
    if not satisfied(evidence.value, evidence.limit, evidence.direction):
        return "warn" if Level(evidence.level) is Level.WARN else "fail"
    return "info" if Direction(evidence.direction) is Direction.RECORD else "pass"


def _samples(values: list[float] | None) -> Samples | None:
    if not values:
        return None
    return Samples(
        count=len(values),
        low=min(values),
        middle=_median(values),
        high=max(values),
        values=tuple(values),
    )


def _median(values: list[float]) -> float:
    # Halved before they are added: the same digits, and no overflow.
    return statistics.median_low(values) / 2 + statistics.median_high(values) / 2
