"""Checks that measure the run itself: computed from the other checks, never by a test.

They are items like any other, so a report shows their evidence; and as they are computed again
whenever a record is assembled, nothing stored about them is trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import floor

from forge_harness.policy import CatalogueEntry, Policy
from forge_harness.record import CheckRecord, EvidenceRecord, ItemRecord
from forge_harness.scoring.score import credit_of
from forge_harness.types import Direction, Outcome, Profile

PREFIX = "derived::"
"""Starts the node id of a derived item."""


def without_derived(items: Iterable[ItemRecord]) -> list[ItemRecord]:
    """Returns the items that tests gave."""
    return [item for item in items if not item.nodeid.startswith(PREFIX)]


def derived_items(
    policy: Policy, profile: Profile, checks: Sequence[CheckRecord]
) -> list[ItemRecord]:
    """Returns the items of the derived checks in scope.

    A check that `measures_suite` is the share of that suite's severity weight that passes, against
    the threshold `<check id>.at_least`. What is not measured counts on neither side: where it
    decides, the check is not measured.

    Args:
        policy: Catalogue, weights and thresholds.
        profile: Of the run.
        checks: The checks in scope, from the items of tests.
    """
    chosen = {check.id for check in checks}
    derived = [entry for entry in policy.catalogue if entry.measures_suite and entry.id in chosen]
    return [_share(policy, profile, entry, checks) for entry in derived]


def _share(
    policy: Policy, profile: Profile, entry: CatalogueEntry, checks: Sequence[CheckRecord]
) -> ItemRecord:
    stated = policy.thresholds.get(f"{entry.id}.at_least")
    if stated is None:
        return _item(entry.id, Outcome.NOT_MEASURED, f"the policy has no {entry.id}.at_least")
    members = [check for check in checks if check.suite == entry.measures_suite]
    there = {check.id for check in members}
    left_out = [
        other.id
        for other in policy.in_scope(profile)
        if other.suite == entry.measures_suite and other.id not in there
    ]
    if left_out:
        reason = f"the {entry.measures_suite} suite did not run whole: without {left_out[0]}"
        return _item(entry.id, Outcome.NOT_MEASURED, reason)
    credits = [credit for credit in map(credit_of, members) if credit.applicable]
    weights = {credit.id: policy.severity_weights[credit.severity] for credit in credits}
    total = sum(weights.values())
    if not total:
        reason = f"no check of the {entry.measures_suite} suite applies"
        return _item(entry.id, Outcome.NOT_MEASURED, reason)
    # The decimal that is written in the policy: 9/10 is under the float nearest to 0.9.
    limit = Fraction(repr(stated))
    low = Fraction(sum(weights[credit.id] * credit.low for credit in credits), total)
    high = Fraction(sum(weights[credit.id] * credit.high for credit in credits), total)
    of = f"of {total} points of severity over {len(weights)} checks"
    name = entry.id.partition(".")[2]
    bounds = [
        _evidence(entry.id, f"{name}_low", low, f"proved, {of}"),
        _evidence(entry.id, f"{name}_high", high, f"possible, {of}"),
    ]
    if low < limit <= high:
        unmeasured = ", ".join(credit.id for credit in credits if credit.low < credit.high)
        reason = f"from {_shown(low)} to {_shown(high)}, limit {stated:g}; unmeasured: {unmeasured}"
        return _item(entry.id, Outcome.NOT_MEASURED, reason, bounds)
    # Decided either way, whatever is not measured.
    value = low if low >= limit else high
    judged = _evidence(entry.id, name, value, f"share {of}", stated)
    return _item(entry.id, Outcome.PASS if value >= limit else Outcome.FAIL, "", [judged, *bounds])


def _evidence(
    check: str, name: str, value: Fraction, reason: str, limit: float | None = None
) -> EvidenceRecord:
    direction = Direction.RECORD if limit is None else Direction.AT_LEAST
    return EvidenceRecord(
        item=f"{PREFIX}{check}",
        name=name,
        value=_shown(value) if limit is None else _judged(value, limit),
        unit="1",
        limit=limit,
        direction=direction.value,
        reason=reason,
        samples=None,
    )


def _item(
    check: str, outcome: Outcome, reason: str, evidence: Sequence[EvidenceRecord] = ()
) -> ItemRecord:
    return ItemRecord(
        nodeid=f"{PREFIX}{check}",
        check=check,
        outcome=outcome,
        reason=reason,
        duration_s=0.0,
        evidence=list(evidence),
    )


def _judged(share: Fraction, limit: float) -> float:
    """Returns a share in digits that are on the same side of the limit as the share itself."""
    reached = share >= Fraction(repr(limit))
    return float(share) if reached and _shown(share) < limit else _shown(share)


def _shown(share: Fraction) -> float:
    # Floored, so that no share is rounded over its limit.
    return floor(share * 10_000) / 10_000
