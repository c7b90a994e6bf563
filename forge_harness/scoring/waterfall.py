"""Where the points went, from 100 down to the low score, and the cheapest way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from typing import Literal

from forge_harness.policy import Policy
from forge_harness.record import RunRecord
from forge_harness.scoring.score import CheckCredit, Score, check_weights, credit_of, score
from forge_harness.types import Outcome, Severity

_CENT = Decimal("0.01")


@dataclass(frozen=True, slots=True, kw_only=True)
class WaterfallStep:
    """One step down. Over all steps `points` add up to exactly 100 - low, and so do `shown`."""

    kind: Literal["check", "cap", "floor"]
    id: str
    """Check id, or the sentence of a cap."""
    suite: str
    severity: Severity | None
    outcome: Outcome | None
    points: Fraction
    """Points lost at this step, of 100."""
    shown: Decimal
    """`points` to two digits, rounded so that the column adds up."""
    remaining: Fraction
    """What is left after this step."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """One check to bring to a full pass, and the score it would lead to."""

    check: str
    severity: Severity
    outcome: Outcome
    points: Fraction
    """Points the check holds back before caps."""
    low_after: int
    """Low score once this and all repairs before it are made."""


@dataclass(frozen=True, slots=True)
class _Loss:
    kind: Literal["check", "cap", "floor"]
    id: str
    points: Fraction
    credit: CheckCredit | None
    reason: str


def waterfall(record: RunRecord, policy: Policy) -> list[WaterfallStep]:
    """Returns the steps from 100 to the low score: checks, largest loss first, caps, flooring."""
    credits = [credit_of(check) for check in record.checks]
    scored = score(policy, credits)
    reasons = {check.id: check.reason for check in record.checks}
    losses = _check_losses(policy, credits, reasons)
    losses += _cap_losses(scored)
    rest = Fraction(100) - scored.low - sum((loss.points for loss in losses), Fraction(0))
    if rest:
        what = "no check in scope applies" if not losses else "scores are never rounded up"
        losses.append(_Loss("floor", "rounded down", rest, None, what))
    return _steps(losses)


def way_back(record: RunRecord, policy: Policy, *, target: int = 100) -> list[Repair]:
    """Returns the repairs that raise the low score most per check, until `target` is reached.

    While a cap holds the score down, the checks that hold that cap come first, since no other
    repair moves the score; otherwise the check that holds back the most points.
    """
    credits = [credit_of(check) for check in record.checks]
    weights = check_weights(policy, credits)
    repairs: list[Repair] = []
    scored = score(policy, credits)
    while scored.low < target:
        wanted = _next_repair(credits, weights, scored)
        if wanted is None:
            break
        fixed = replace(
            wanted, outcome=Outcome.PASS, low=Fraction(1), high=Fraction(1), has_evidence=True
        )
        credits = [fixed if credit is wanted else credit for credit in credits]
        scored = score(policy, credits)
        repairs.append(
            Repair(
                check=wanted.id,
                severity=wanted.severity,
                outcome=wanted.outcome,
                points=weights[wanted.id] * (1 - wanted.low),
                low_after=scored.low,
            )
        )
    return repairs


def _check_losses(
    policy: Policy, credits: Sequence[CheckCredit], reasons: dict[str, str]
) -> list[_Loss]:
    weights = check_weights(policy, credits)
    losses = [
        _Loss("check", c.id, weights[c.id] * (1 - c.low), c, reasons[c.id])
        for c in credits
        if c.applicable and c.low < 1
    ]
    return sorted(losses, key=lambda loss: -loss.points)


def _cap_losses(scored: Score) -> list[_Loss]:
    """One step a cap, highest ceiling first; one that is no tighter than the last costs 0."""
    losses, level = [], scored.uncapped_low
    for cap in sorted(scored.caps, key=lambda cap: -cap.limit):
        after = min(level, Fraction(cap.limit))
        reason = f"at most {cap.limit} while {cap.reason} ({_few(cap.checks)})"
        losses.append(_Loss("cap", cap.reason, level - after, None, reason))
        level = after
    return losses


def _few(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
    return ", ".join(ids[:3]) + more


def _steps(losses: Sequence[_Loss]) -> list[WaterfallStep]:
    steps, remaining, shown_before = [], Fraction(100), Decimal(100)
    for loss in losses:
        remaining -= loss.points
        shown_after = _rounded(remaining)
        steps.append(
            WaterfallStep(
                kind=loss.kind,
                id=loss.id,
                suite=loss.credit.suite if loss.credit else "",
                severity=loss.credit.severity if loss.credit else None,
                outcome=loss.credit.outcome if loss.credit else None,
                points=loss.points,
                shown=shown_before - shown_after,
                remaining=remaining,
                reason=loss.reason,
            )
        )
        shown_before = shown_after
    return steps


def _rounded(value: Fraction) -> Decimal:
    exact = Decimal(value.numerator) / Decimal(value.denominator)
    return exact.quantize(_CENT, rounding=ROUND_HALF_EVEN)


def _next_repair(
    credits: Sequence[CheckCredit], weights: dict[str, Fraction], scored: Score
) -> CheckCredit | None:
    candidates = [c for c in credits if c.applicable and c.low < 1]
    binding = [cap for cap in scored.caps if scored.uncapped_low > cap.limit]
    if binding:
        held = {check for cap in binding if cap.limit == binding[0].limit for check in cap.checks}
        candidates = [c for c in candidates if c.id in held] or candidates
    return max(candidates, key=lambda c: weights[c.id] * (1 - c.low), default=None)
