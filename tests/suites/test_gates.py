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
from forge_harness.protocols import QualityRun, methods_of
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


def outcomes_of_rules(run_check):
    """Outcome of each rule check: the worst of its items."""
    files = [suites_dir() / "gates" / f"test_{name}.py" for name in ("decisions", "rules")]
    more = [argument for check in RULES[1:] for argument in ("--forge-check", check)]
    items = run_check(RULES[0], arguments=more, paths=files).items
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
        moved = now.value is not None and abs(now.value - then.value) > 0.02 * abs(then.value)
        return with_result(result, Outcome.FAIL) if moved else result


class AbsoluteTolerance(Coordinator):
    """The tolerance is taken in the unit of the value instead of as a share of it."""

    def _against(self, now, then):
        wide = abs(now.value - then.value) <= 1.0
        result = super()._against(now, then)
        return with_result(result, Outcome.PASS) if wide else result


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
]


def test_the_rules_hold_as_shipped(run_check):
    assert outcomes_of_rules(run_check) == {}


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


# --- gates on what was trained ---------------------------------------------------------------

SEEDS, BLOCKS, SIZE = (0, 1, 2), 8, 1000
SHARES = {
    "digits": {"ternary": 0.980, "full": 0.982, "post_training": 0.86},
    "bytes": {"ternary": 0.578, "full": 0.580, "post_training": 0.36},
}


def quality_run(task, arm, seed, **changes):
    """A run with block counts that follow the arm's share and vary a little over blocks."""
    share = SHARES[task][arm]
    correct = tuple(round(SIZE * share) + (b + seed) % 3 - 1 for b in range(BLOCKS))
    fields = {
        "task": task,
        "arm": arm,
        "seed": seed,
        "steps": 300,
        "learning_rate": 2e-3,
        "parameters": 40_000,
        "accuracy": sum(correct) / (SIZE * BLOCKS),
        "loss": 3.0 * (1 - share) + 0.01 * seed,
        "block_correct": correct,
        "block_size": (SIZE,) * BLOCKS,
        "curve": tuple((step, 2.0 / (1 + step), -1.0) for step in range(0, 300, 10)),
        "finite": True,
        "seconds": 1.0,
        "peak_rss_bytes": 900_000_000,
        "data_digest": f"sha256:{task}",
        "package_bytes": 20_000 if arm == "ternary" else 0,
        "full_precision_bytes": 160_000,
    }
    return QualityRun(**{**fields, **changes})


def study_of(change=None, tasks=tuple(SHARES)):
    """The whole study; `change` maps a run to the run (or None) that takes its place."""
    runs = [quality_run(t, arm, s) for t in tasks for arm in SHARES[t] for s in SEEDS]
    changed = [change(run) if change else run for run in runs]
    return [run for run in changed if run is not None]


def replaced(run, **changes):
    from dataclasses import replace

    return replace(run, **changes)


class Study:
    """A subject that has a plan for the quality comparison and says what its data are."""

    name = "study"
    TASKS = tuple(SHARES)

    def quality_plan(self, profile):
        return [(t, arm, s) for t in self.TASKS for arm in ("ternary", "full") for s in SEEDS]

    def quality_run(self, task, arm, seed, profile):
        return [quality_run(task, arm, seed)]

    def data_info(self, task):
        from types import SimpleNamespace

        return SimpleNamespace(kind="classes" if task == "digits" else "tokens")


for method in set(methods_of("LoadsData")) - {"data_info"}:
    setattr(Study, method, lambda self, *arguments, **options: None)


def check(run_check, name, change=None, **options):
    return run_check(f"gates.{name}", Study(), study=study_of(change), **options)


QUALITY = (
    "accuracy",
    "quantized_accuracy_ratio",
    "training_stability",
    "resource_use",
    "compression_ratio",
)


@pytest.mark.parametrize("name", QUALITY)
def test_a_good_study_passes(run_check, name):
    run = check(run_check, name)
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


def weak_quantization(run):
    """Ternary models lose 3 %."""
    if run.arm != "ternary":
        return run
    correct = tuple(round(c * 0.97) for c in run.block_correct)
    return replaced(run, block_correct=correct, accuracy=sum(correct) / sum(run.block_size))


def noisy_quantization(run):
    """The mean ratio is over the limit, but one seed in three is far off."""
    if run.arm != "ternary" or run.seed != 2:
        return run
    correct = tuple(round(c * 0.985) for c in run.block_correct)
    return replaced(run, block_correct=correct, accuracy=sum(correct) / sum(run.block_size))


def control_as_good(run):
    """Post-training ternarization does no harm: the task proves nothing."""
    if run.arm != "post_training":
        return run
    full = quality_run(run.task, "full", run.seed)
    return replaced(run, block_correct=full.block_correct, accuracy=full.accuracy)


def best_seed_only(run):
    """R20: two of three seeds are left out."""
    return run if run.seed == 0 else None


def claimed_accuracy(run):
    """The accuracy is not that of the counts."""
    return replaced(run, accuracy=0.999) if run.arm == "ternary" else run


def other_seeds(run):
    """Ternary and full precision are not paired."""
    return replaced(run, seed=run.seed + 10) if run.arm == "ternary" else run


def other_data(run):
    """One arm saw another corpus."""
    return replaced(run, data_digest="sha256:other") if run.arm == "full" else run


def other_blocks(run):
    """One arm is evaluated on other blocks."""
    if run.arm != "ternary":
        return run
    return replaced(run, block_size=(SIZE + 1,) * (BLOCKS - 1) + (SIZE - BLOCKS + 1,))


def nan_accuracy(run):
    """One run diverged and reports NaN."""
    if (run.arm, run.seed) != ("ternary", 1):
        return run
    return replaced(run, accuracy=math.nan, loss=math.nan, finite=False)


def one_diverged(run):
    """One digits seed stays at chance."""
    if (run.task, run.arm, run.seed) != ("digits", "ternary", 1):
        return run
    correct = (SIZE // 10,) * BLOCKS
    return replaced(run, block_correct=correct, accuracy=0.1)


def one_not_finite(run):
    """One run met a NaN on its way."""
    return replaced(run, finite=False) if (run.arm, run.seed) == ("ternary", 0) else run


def hungry(run):
    """One process needs 9 GB."""
    return replaced(run, peak_rss_bytes=9_000_000_000) if run.seed == 1 else run


def latent_exported(run):
    """E07: the package holds latent weights instead of ternary codes."""
    return replaced(run, package_bytes=run.full_precision_bytes) if run.arm == "ternary" else run


def poor_digits(run):
    """Ternary digits at 80 %."""
    if run.task != "digits":
        return run
    correct = tuple(round(c * 0.8) for c in run.block_correct)
    return replaced(run, block_correct=correct, accuracy=sum(correct) / sum(run.block_size))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("accuracy", poor_digits, "accuracy is 0.78"),
        ("accuracy", nan_accuracy, "miscounted_runs is 2"),
        ("accuracy", claimed_accuracy, "miscounted_runs is 6"),
        ("accuracy", best_seed_only, "missing_runs is 12"),
        ("quantized_accuracy_ratio", weak_quantization, "quantized_accuracy_ratio is 0.96"),
        ("quantized_accuracy_ratio", control_as_good, "control_ratio.bytes is 1, over"),
        ("quantized_accuracy_ratio", best_seed_only, "missing_runs is 12"),
        ("quantized_accuracy_ratio", other_seeds, "missing_runs is 6"),
        ("quantized_accuracy_ratio", other_data, "data_versions.bytes is 6, expected 3"),
        ("quantized_accuracy_ratio", other_blocks, "unpaired_runs.bytes is"),
        ("training_stability", one_diverged, "training_stability is 0.833333"),
        ("training_stability", one_not_finite, "training_stability is 0.666667"),
        ("resource_use", hungry, "resource_use is 9 GB, over its limit of 8 GB"),
        ("compression_ratio", latent_exported, "compression_ratio is 1, under"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_bad_study_fails(run_check, name, change, reason):
    run = check(run_check, name, change)
    assert run.outcome is Outcome.FAIL
    assert run.reason.startswith(reason)


def unsized(run):
    return replaced(run, package_bytes=0)


def without_memory(run):
    return replaced(run, peak_rss_bytes=0)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("compression_ratio", unsized, "6 of 6 ternary runs do not say"),
        ("resource_use", without_memory, "no run of the study says"),
        ("quantized_accuracy_ratio", noisy_quantization, "inconclusive: the bytes ratio 0.99"),
    ],
)
def test_what_the_study_does_not_say_is_not_measured(run_check, name, change, reason):
    run = check(run_check, name, change)
    assert run.outcome is Outcome.NOT_MEASURED
    assert run.reason.startswith(reason)


def test_one_seed_gives_no_interval(run_check):
    class OneSeed(Study):
        def quality_plan(self, profile):
            return [row for row in super().quality_plan(profile) if row[2] == 0]

    run = run_check("gates.quantized_accuracy_ratio", OneSeed(), study=study_of(best_seed_only))
    assert run.outcome is Outcome.NOT_MEASURED
    assert "has 1 seeds; an interval needs two" in run.reason


def test_a_study_of_tokens_has_no_absolute_accuracy(run_check):
    class OnlyBytes(Study):
        TASKS = ("bytes",)

    run = run_check("gates.accuracy", OnlyBytes(), study=study_of(tasks=("bytes",)))
    assert run.outcome is Outcome.NOT_MEASURED


def test_the_report_finds_its_curves(run_check):
    evidence = {
        record.name: record
        for record in check(run_check, "quantized_accuracy_ratio").items[0].evidence
    }
    for task, arm in (("digits", "ternary"), ("digits", "full"), ("bytes", "ternary")):
        curve = evidence[f"loss_curve.{task}.{arm}"].samples
        steps = evidence[f"loss_curve_steps.{task}.{arm}"].samples
        assert len(curve) == len(steps) == 30
        assert curve[0] == 2.0
    assert evidence["ratio_low.digits"].value < evidence["ratio.digits"].value
    assert evidence["data_digest.bytes"].value == "sha256:bytes"


class Builds:
    """A subject whose models have a given number of parameters."""

    name = "builds"

    def __init__(self, width=100):
        self.width = width

    def tasks(self):
        return ["small", "large"]

    def build_model(self, task, *, seed):
        from torch import nn

        width = self.width if task == "large" else 4
        model = nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, width))
        model[1].weight = model[0].weight
        return model


for method in set(methods_of("BuildsModel")) - {"tasks", "build_model"}:
    setattr(Builds, method, lambda self, *arguments, **options: None)


def test_parameters_are_counted_once(run_check):
    run = run_check("gates.model_complexity", Builds())
    assert run.outcome is Outcome.PASS
    assert run.evidence("parameters.large") == 100 * 100 + 100


def test_a_model_over_its_budget_fails(run_check):
    run = run_check("gates.model_complexity", Builds(width=1415))
    assert run.outcome is Outcome.FAIL
    assert run.reason.startswith("model_complexity is 2003640 parameters, over its limit")
