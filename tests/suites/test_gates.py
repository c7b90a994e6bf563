"""Each gate check goes red for its own defect, and the others stay as they are.

Source numbers (R01 ...) are those of the published defects the seeds follow: NaN passing a
threshold, `>` for `>=`, missing results out of the denominator, and so on.
"""

from __future__ import annotations

import math
from fractions import Fraction
from math import ceil

import pytest

from forge_harness.integration import quality_coordinator as module
from forge_harness.paths import suites_dir
from forge_harness.record import RunRecord
from forge_harness.scoring import rollup, score
from forge_harness.types import Direction, Outcome, Severity

Coordinator = module.QualityCoordinator
RULES = [
    f"gates.{name}"
    for name in (
        "boundary_semantics",
        "non_finite_fails",
        "missing_fails",
        "units_checked",
        "severity_policy",
        "waiver_expiry",
        "baseline_regression",
        "every_gate_can_fail",
    )
]


def outcomes_of_rules(run_check, *options):
    """Outcome of each rule check: the worst of its items."""
    files = [suites_dir() / "gates" / f"test_{name}.py" for name in ("decisions", "rules")]
    more = [argument for check in RULES[1:] for argument in ("--forge-check", check)]
    items = run_check(RULES[0], arguments=[*more, *options], paths=files).items
    assert {item.check for item in items} == set(RULES)
    bad = {item.check: item for item in items if item.outcome is not Outcome.PASS}
    assert all(item.outcome is Outcome.FAIL for item in bad.values()), bad
    return {check: item.reason for check, item in bad.items()}


def with_result(result, outcome):
    fields = {name: getattr(result, name) for name in ("gate", "value", "unit", "limits")}
    return module.GateResult(outcome=outcome, reason="", **fields)


class NanPasses(Coordinator):
    """R01: `if value < limit: fail`, which is false for NaN."""

    def evaluate_gate(self, name, value, unit="1"):
        result = super().evaluate_gate(name, value, unit)
        return with_result(result, Outcome.PASS) if str(value) == "nan" else result


class InfinityIsGood(Coordinator):
    """R01: infinity is over every lower limit."""

    def evaluate_gate(self, name, value, unit="1"):
        result = super().evaluate_gate(name, value, unit)
        upwards = result.limits[0].direction is Direction.AT_LEAST
        return with_result(result, Outcome.PASS) if upwards and str(value) == "inf" else result


class NanAveragedAway(Coordinator):
    """D12: values that are not finite are dropped before the aggregate."""

    def _worst(self, name, rows):
        usable = [row for row in rows if str(row[0]) not in ("nan", "inf", "-inf")]
        return super()._worst(name, usable or rows)


class StrictComparison(Coordinator):
    """R03: `>` where `>=` is meant."""

    def evaluate_gate(self, name, value, unit="1"):
        result = super().evaluate_gate(name, value, unit)
        on_limit = any(side.limit == value for side in result.limits)
        return with_result(result, Outcome.FAIL) if on_limit and result.passed else result


class RoundsBeforeComparing(Coordinator):
    """R03, R07: compares what the report would print."""

    def evaluate_gate(self, name, value, unit="1"):
        rounded = float(f"{value:.4g}") if isinstance(value, float) else value
        return super().evaluate_gate(name, rounded, unit)


class ComparesText(Coordinator):
    """R22: '9' is over '10' as text."""

    def evaluate_gate(self, name, value, unit="1"):
        result = super().evaluate_gate(name, value, unit)
        if result.value is None:
            return result
        side = result.limits[0]
        below = str(float(value)) < str(float(side.limit))
        good = (not below) if side.direction is Direction.AT_LEAST else below
        good = good or float(value) == side.limit
        return with_result(result, Outcome.PASS if good else Outcome.FAIL)


class MissingIsGreen(Coordinator):
    """R04, R06: a gate without a value has nothing to complain about."""

    def evaluate_gate(self, name, value, unit="1"):
        result = super().evaluate_gate(name, value, unit)
        return with_result(result, Outcome.PASS) if value is None else result


class ListsOnlyWhatItHas(Coordinator):
    """R04: a gate without a value passes unseen, the aggregate is over the others."""

    def assemble(self, items, *, context, scope=None, state="finished"):
        seen = {item.check for item in items}
        values = self.policy.to_json()
        values["catalogue"] = [e for e in values["catalogue"] if e["id"] in seen]
        narrow = type(self)(type(self.policy).model_validate(values), self.waivers)
        return Coordinator.assemble(narrow, items, context=context, scope=scope, state=state)


class SkippedIsPassed(Coordinator):
    """R05: a skip counts as a pass."""

    def assemble(self, items, **options):
        skipped = [i for i in items if i.outcome is Outcome.NOT_MEASURED]
        passed = [i.model_copy(update={"outcome": Outcome.PASS}) for i in skipped]
        return super().assemble([*(i for i in items if i not in skipped), *passed], **options)


class EmptyPasses(Coordinator):
    """R06: `all([])`."""

    def assemble(self, items, **options):
        record = super().assemble(items, **options)
        return record if items else record.model_copy(update={"verdict": "PASS"})


class Stale(Coordinator):
    """R08: results are reused although the policy changed."""

    def _fresh(self, record):
        return record.model_copy(update={"policy_digest": self.policy.digest})

    def evaluate(self, evidence):
        is_record = isinstance(evidence, RunRecord)
        return super().evaluate(self._fresh(evidence) if is_record else evidence)

    def verdict(self, record):
        return super().verdict(self._fresh(record))


class CachedByName(Coordinator):
    """R08, R18: the first result of a gate is the result of that gate."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._seen = {}

    def _of_record(self, name, record):
        return self._seen.setdefault(name, super()._of_record(name, record))


class UnitsIgnored(Coordinator):
    """R09: seconds are compared with milliseconds."""

    def evaluate_gate(self, name, value, unit="1"):
        return super().evaluate_gate(name, value, self._unit(name))


class DimensionlessIsAnyUnit(Coordinator):
    """R09: a bare number is taken in the threshold's unit."""

    def evaluate_gate(self, name, value, unit="1"):
        return super().evaluate_gate(name, value, self._unit(name) if unit in ("", "1") else unit)


class OneGateFallsThrough(Coordinator):
    """R17: one name has no branch, and the default is True."""

    def _of_record(self, name, record):
        result = super()._of_record(name, record)
        is_red = result.outcome is Outcome.FAIL
        return with_result(result, Outcome.PASS) if name == "latency" and is_red else result


class OneRedForAll(Coordinator):
    """A fault in one gate turns its neighbours red."""

    def evaluate(self, evidence):
        results = super().evaluate(evidence)
        if isinstance(evidence, RunRecord) and any(r.outcome is Outcome.FAIL for r in results):
            return [with_result(result, Outcome.FAIL) for result in results]
        return results


class WaiversNeverExpire(Coordinator):
    """An expired waiver still excuses."""

    def __init__(self, policy, waivers=None, baseline=None):
        forever = [w.model_copy(update={"expires": "9999-12-31"}) for w in waivers or ()]
        super().__init__(policy, forever or waivers, baseline)


class UnneededWaiversForgotten(Coordinator):
    """A waiver of a check that passes says nothing."""

    def assemble(self, items, **options):
        needed = {item.check for item in items if item.outcome is not Outcome.PASS}
        self.waivers = [w for w in self.waivers or () if w.check in needed or "typo" in w.check]
        return super().assemble(items, **options)


class ExpiresADayEarly(Coordinator):
    """The last day of a waiver does not count."""

    def __init__(self, policy, waivers=None, baseline=None):
        today = "2026-06-15"
        cut = [
            w.model_copy(update={"expires": "2026-06-14"}) if w.expires == today else w
            for w in waivers or ()
        ]
        super().__init__(policy, cut or waivers, baseline)


class AnyMachine(Coordinator):
    """A baseline of another machine class is compared with a warning at most."""

    def compare_baseline(self, record, baseline=None):
        accepted = self.baseline if baseline is None else baseline
        same = record.model_copy(update={"environment": accepted.environment})
        return super().compare_baseline(same, accepted)


class EitherWayIsARegression(Coordinator):
    """R22: a change for the better is reported as one for the worse."""

    def _against(self, now, then):
        result = super()._against(now, then)
        moved = now.value is not None and abs(now.value - then) > 0.02 * abs(then)
        return with_result(result, Outcome.FAIL) if moved else result


class AbsoluteTolerance(Coordinator):
    """The tolerance is taken in the unit of the value instead of as a share of it."""

    def _against(self, now, then):
        wide = abs(now.value - then) <= 1.0
        result = super()._against(now, then)
        return with_result(result, Outcome.PASS) if wide else result


class TimesAreRegressions(Coordinator):
    """A time is held against that of another run."""

    def _against(self, now, then):
        result = super()._against(now, then)
        is_worse = now.unit == "s" and now.value > 1.02 * then
        return with_result(result, Outcome.FAIL) if is_worse else result


COORDINATORS = [
    (NanPasses, {"non_finite_fails"}),
    (InfinityIsGood, {"non_finite_fails"}),
    (NanAveragedAway, {"non_finite_fails"}),
    (StrictComparison, {"boundary_semantics"}),
    (RoundsBeforeComparing, {"boundary_semantics"}),
    (ComparesText, {"boundary_semantics"}),
    (MissingIsGreen, {"missing_fails"}),
    (ListsOnlyWhatItHas, {"missing_fails"}),
    (SkippedIsPassed, {"missing_fails", "severity_policy", "waiver_expiry"}),
    (EmptyPasses, {"missing_fails"}),
    (Stale, {"missing_fails"}),
    (CachedByName, {"every_gate_can_fail", "baseline_regression"}),
    (UnitsIgnored, {"units_checked"}),
    (DimensionlessIsAnyUnit, {"units_checked"}),
    (OneGateFallsThrough, {"every_gate_can_fail"}),
    (OneRedForAll, {"every_gate_can_fail"}),
    (WaiversNeverExpire, {"waiver_expiry"}),
    (UnneededWaiversForgotten, {"waiver_expiry"}),
    (ExpiresADayEarly, {"waiver_expiry"}),
    (AnyMachine, {"baseline_regression"}),
    (EitherWayIsARegression, {"baseline_regression"}),
    (AbsoluteTolerance, {"baseline_regression"}),
    (TimesAreRegressions, {"baseline_regression"}),
]


def test_the_rules_hold_as_shipped(run_check):
    assert outcomes_of_rules(run_check) == {}


@pytest.mark.parametrize("limit", [0.0, -0.5, 1.0])
def test_the_rules_hold_under_limits_that_nothing_meets_or_misses(run_check, tmp_path, limit):
    """A policy that turns a gate off by a limit of 0 made the run fail."""
    (tmp_path / "policy.toml").write_text(
        f"[thresholds.gates]\naccuracy.at_least = {limit}\nlatency.at_most = {limit}\n"
        f"resource_use.at_most = {limit}\n"
    )
    assert outcomes_of_rules(run_check, "--forge-policy", str(tmp_path / "policy.toml")) == {}


@pytest.mark.parametrize(("broken", "red"), COORDINATORS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_broken_coordinator(run_check, monkeypatch, broken, red):
    monkeypatch.setattr(module, "QualityCoordinator", broken)
    reasons = outcomes_of_rules(run_check)
    assert set(reasons) == {f"gates.{name}" for name in red}
    assert all("wrong_decisions is" in reason for reason in reasons.values())


def round_up(value):
    return math.floor(value + Fraction(1, 2))


HALF_FOR_FAILING = {**rollup.CREDITS, Outcome.FAIL: (Fraction(1, 2), Fraction(1, 2))}


SCORING = {
    # R07: scores are rounded to the nearest integer.
    "rounded": (score, "floor", round_up, {"severity_policy"}),
    "rounded_up": (score, "floor", ceil, {"severity_policy"}),
    # The most expensive mistake leaves no mark on the score.
    "no_critical_cap": (score, "CAP_CRITICAL", 100, {"severity_policy"}),
    "no_high_cap": (score, "CAP_SEVERE", 100, {"severity_policy"}),
    # R13, R21: the mean where the worst item counts.
    "severe_means": (rollup, "SEVERE", frozenset(), {"severity_policy"}),
    "severe_only_critical": (
        rollup,
        "SEVERE",
        frozenset({Severity.CRITICAL}),
        {"severity_policy"},
    ),
    "half_for_failing": (rollup, "CREDITS", HALF_FOR_FAILING, {"severity_policy"}),
}


@pytest.mark.parametrize("defect", SCORING)
def test_broken_scoring(run_check, monkeypatch, defect):
    where, name, value, red = SCORING[defect]
    monkeypatch.setattr(where, name, value)
    assert {f"gates.{check}" for check in red} <= set(outcomes_of_rules(run_check))
