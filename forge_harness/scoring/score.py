"""forge-score/1: credits -> suite scores, integration score as an interval, coverage, caps.

Exact fractions throughout; the integers are floored, so no score is ever rounded up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from forge_harness.policy import Policy
from forge_harness.record import CheckRecord
from forge_harness.types import Outcome, Severity

CAP_CRITICAL = 49
"""Ceiling of both ends while a critical check fails."""
CAP_SEVERE = 79
"""Ceiling while a high check fails, a critical one is not measured or a suite is under 50."""
SUITE_FLOOR = 50
"""A suite below this score caps the whole and rules a passing verdict out."""
_HUNDRED = Fraction(100)
_FAILED = (Outcome.FAIL, Outcome.ERROR)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckCredit:
    """What the score reads of a check."""

    id: str
    suite: str
    severity: Severity
    outcome: Outcome
    low: Fraction
    high: Fraction
    has_evidence: bool

    @property
    def applicable(self) -> bool:
        """Whether the check is in the denominator."""
        return self.outcome is not Outcome.NOT_APPLICABLE

    @property
    def measured(self) -> bool:
        """Whether the check counts as covered: it ended, and left evidence."""
        return self.applicable and self.outcome is not Outcome.NOT_MEASURED and self.has_evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteScore:
    """One suite's score; all fractions, scores in [0, 100], coverage in [0, 1]."""

    name: str
    weight: int
    low: Fraction
    high: Fraction
    coverage: Fraction
    applicable: bool
    """Whether any of its checks in scope applies; otherwise the suite has no weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """A ceiling on both ends of the score, and the checks or the suite that hold it down."""

    limit: int
    reason: str
    checks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The integration score before and after caps and flooring."""

    uncapped_low: Fraction
    uncapped_high: Fraction
    low: int
    high: int
    coverage: Fraction
    suites: tuple[SuiteScore, ...]
    caps: tuple[Cap, ...]
    """Lowest first."""


def credit_of(check: CheckRecord) -> CheckCredit:
    """Returns what the score reads of a recorded check."""
    return CheckCredit(
        id=check.id,
        suite=check.suite,
        severity=check.severity,
        outcome=check.outcome,
        low=Fraction(check.credit_low),
        high=Fraction(check.credit_high),
        has_evidence=bool(check.evidence),
    )


def score(policy: Policy, credits: Sequence[CheckCredit]) -> Score:
    """Computes the integration score of the checks in scope.

    Suites weigh as the policy says, normalised by the sum of the weights of the suites that
    have an applicable check; within a suite a check weighs as its severity.

    Args:
        policy: Weights of suites and severities.
        credits: One entry a check in scope; suites come out in order of first appearance.
    """
    names = tuple(dict.fromkeys(credit.suite for credit in credits))
    suites = tuple(
        _suite(policy, name, [credit for credit in credits if credit.suite == name])
        for name in names
    )
    total = sum(suite.weight for suite in suites if suite.applicable)
    low, high, coverage = (
        _weighted(suites, total, "low"),
        _weighted(suites, total, "high"),
        _weighted(suites, total, "coverage"),
    )
    caps = tuple(sorted(_caps(credits, suites), key=lambda cap: cap.limit))
    ceiling = min((Fraction(cap.limit) for cap in caps), default=_HUNDRED)
    return Score(
        uncapped_low=low,
        uncapped_high=high,
        low=floor(min(low, ceiling)),
        high=floor(min(high, ceiling)),
        coverage=coverage,
        suites=suites,
        caps=caps,
    )


def check_weights(policy: Policy, credits: Sequence[CheckCredit]) -> dict[str, Fraction]:
    """Returns the points of 100 each applicable check carries; they add up to 100 or to 0."""
    applicable = [credit for credit in credits if credit.applicable]
    per_suite: dict[str, int] = {}
    for credit in applicable:
        weight = policy.severity_weights[credit.severity]
        per_suite[credit.suite] = per_suite.get(credit.suite, 0) + weight
    total = sum(policy.suite_weights[name] for name in per_suite)
    return {
        credit.id: _HUNDRED
        * Fraction(policy.suite_weights[credit.suite], total)
        * Fraction(policy.severity_weights[credit.severity], per_suite[credit.suite])
        for credit in applicable
    }


def _suite(policy: Policy, name: str, credits: Sequence[CheckCredit]) -> SuiteScore:
    applicable = [credit for credit in credits if credit.applicable]
    weights = [policy.severity_weights[credit.severity] for credit in applicable]
    total = sum(weights)

    def share(values: Iterable[Fraction]) -> Fraction:
        weighted = (w * value for w, value in zip(weights, values, strict=True))
        return sum(weighted, Fraction(0)) / total if total else Fraction(0)

    return SuiteScore(
        name=name,
        weight=policy.suite_weights[name],
        low=_HUNDRED * share(credit.low for credit in applicable),
        high=_HUNDRED * share(credit.high for credit in applicable),
        coverage=share(Fraction(credit.measured) for credit in applicable),
        applicable=bool(applicable),
    )


def _weighted(suites: Sequence[SuiteScore], total: int, field: str) -> Fraction:
    parts = (s.weight * Fraction(getattr(s, field)) for s in suites if s.applicable)
    return sum(parts, Fraction(0)) / total if total else Fraction(0)


def _caps(credits: Sequence[CheckCredit], suites: Sequence[SuiteScore]) -> Iterable[Cap]:
    rules = (
        (CAP_CRITICAL, Severity.CRITICAL, _FAILED, "a critical check fails"),
        (CAP_SEVERE, Severity.HIGH, _FAILED, "a high check fails"),
        (
            CAP_SEVERE,
            Severity.CRITICAL,
            (Outcome.NOT_MEASURED,),
            "a critical check is not measured",
        ),
    )
    for limit, severity, outcomes, reason in rules:
        holders = tuple(c.id for c in credits if c.severity is severity and c.outcome in outcomes)
        if holders:
            yield Cap(limit=limit, reason=reason, checks=holders)
    for suite in suites:
        if suite.applicable and suite.low < SUITE_FLOOR:
            losing = (c for c in credits if c.suite == suite.name and c.applicable and c.low < 1)
            yield Cap(
                limit=CAP_SEVERE,
                reason=f"suite {suite.name} is under {SUITE_FLOOR}",
                checks=tuple(credit.id for credit in losing),
            )
