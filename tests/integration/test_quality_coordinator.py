"""QualityCoordinator: gates, baselines and verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from forge_harness.cli import gate
from forge_harness.errors import ConfigError, ExitCode
from forge_harness.integration.baselines import machine_class
from forge_harness.integration.quality_coordinator import QualityCoordinator
from forge_harness.policy import CatalogueEntry, Policy, load_policy
from forge_harness.record import EvidenceRecord, ItemRecord, SubjectRecord, Waiver
from forge_harness.scoring import RunContext, Scope
from forge_harness.types import Outcome, Severity

SPECIFIED = {
    "accuracy": (">=", 0.85, "1"),
    "latency": ("<=", 0.1, "s"),
    "resource_use": ("<=", 8.0, "GB"),
    "training_stability": (">=", 0.90, "1"),
    "model_complexity": ("<=", 2_000_000, "parameters"),
    "security_compliance": (">=", 0.90, "1"),
    "quantized_accuracy_ratio": (">=", 0.987, "1"),
    "compression_ratio": (">=", 4.2, "1"),
}
_DROP = "baseline.score_drop.at_most"
MACHINE = {"os": "Linux", "machine": "x86_64", "cpu": "Xeon", "cpu_usable": 2}


def small_policy(**fields):
    defaults = {
        "suite_weights": {"gates": 10},
        "severity_weights": dict(zip(Severity, (8, 4, 2, 1), strict=True)),
        "thresholds": {
            "gates.accuracy.at_least": 0.85,
            "gates.latency.at_most": 0.1,
            "baseline.score_drop.at_most": 2,
            "baseline.gate_worsening.at_most": 0.02,
        },
        "units": {"gates.accuracy": "1", "gates.latency": "s"},
        "catalogue": tuple(
            CatalogueEntry(
                id=f"gates.{name}",
                title=name,
                suite="gates",
                severity=severity,
                component="QualityCoordinator",
            )
            for name, severity in (("accuracy", "critical"), ("latency", "medium"))
        ),
    }
    return Policy.model_validate({**defaults, **fields})


def item(check, value=None, *, unit="1", outcome="pass", name=None):
    evidence = []
    if value is not None:
        evidence.append(
            EvidenceRecord(
                item="i",
                name=name or check.partition(".")[2],
                value=value,
                unit=unit,
                limit=None,
                direction="record",
                reason="",
                samples=None,
            )
        )
    return ItemRecord(
        nodeid=f"{check}::i",
        check=check,
        outcome=outcome,
        reason="",
        duration_s=0.1,
        evidence=evidence,
    )


def context(**fields):
    defaults = {
        "run_id": "r",
        "subject": SubjectRecord(spec="reference", name="reference", capabilities=[]),
        "environment": MACHINE,
        "started_at": "2026-06-15T12:00:00Z",
    }
    return RunContext(**{**defaults, **fields})


def run_of(accuracy=0.9, latency=0.05, policy=None, **fields):
    coordinator = QualityCoordinator(policy or small_policy())
    items = [item("gates.accuracy", accuracy), item("gates.latency", latency, unit="s")]
    return coordinator.assemble(items, context=context(**fields))


class TestEvaluateGate:
    @pytest.mark.parametrize("name", SPECIFIED)
    def test_the_limit_itself_passes_and_one_ulp_beyond_does_not(self, name):
        sign, limit, unit = SPECIFIED[name]
        coordinator = QualityCoordinator(load_policy())
        worse = math.nextafter(limit, -math.inf if sign == ">=" else math.inf)
        better = math.nextafter(limit, math.inf if sign == ">=" else -math.inf)
        outcomes = [coordinator.evaluate_gate(name, v, unit).passed for v in (worse, limit, better)]
        assert outcomes == [False, True, True]

    def test_the_policy_has_exactly_the_eight_gates(self):
        assert QualityCoordinator(load_policy()).gates() == tuple(sorted(SPECIFIED))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", np.float32("nan")])
    @pytest.mark.parametrize(("gate", "unit"), [("accuracy", "1"), ("latency", "s")])
    def test_non_finite_fails(self, gate, unit, value):
        result = QualityCoordinator(small_policy()).evaluate_gate(gate, value, unit)
        assert (result.outcome, result.value) == (Outcome.FAIL, None)
        assert "expected a finite number" in result.reason

    @pytest.mark.parametrize("value", ["9", "", True, [0.9], np.ones(2), object()])
    def test_what_is_no_number_is_an_error(self, value):
        result = QualityCoordinator(small_policy()).evaluate_gate("accuracy", value)
        assert (result.outcome, result.passed) == (Outcome.ERROR, False)

    def test_numpy_scalars_are_numbers(self):
        coordinator = QualityCoordinator(small_policy())
        assert coordinator.evaluate_gate("accuracy", np.float64(0.85)).passed

    def test_nothing_is_not_measured(self):
        result = QualityCoordinator(small_policy()).evaluate_gate("accuracy", None)
        assert (result.outcome, result.reason) == (Outcome.NOT_MEASURED, "accuracy has no value")

    def test_another_unit_is_refused(self):
        coordinator = QualityCoordinator(small_policy())
        result = coordinator.evaluate_gate("latency", 0.05, "ms")
        assert result.outcome is Outcome.ERROR
        assert result.reason == "latency is in 'ms', its threshold in 's'; convert the value"
        assert coordinator.evaluate_gate("latency", 0.05).outcome is Outcome.ERROR

    def test_reasons_name_value_unit_and_limit(self):
        result = QualityCoordinator(small_policy()).evaluate_gate("latency", 0.25, "s")
        assert result.reason == "latency is 0.25 s, over its limit of 0.1 s"

    def test_a_value_one_ulp_past_its_limit_is_shown_as_another(self):
        """It was "accuracy is 0.85, under its limit of 0.85"."""
        result = QualityCoordinator(small_policy()).evaluate_gate(
            "accuracy", math.nextafter(0.85, 0)
        )
        assert result.reason == "accuracy is 0.8499999999999999, under its limit of 0.85"

    def test_an_unknown_gate_names_the_nearest(self):
        with pytest.raises(ConfigError, match="Did you mean 'accuracy'"):
            QualityCoordinator(small_policy()).evaluate_gate("acuracy", 1.0)

    def test_a_threshold_without_unit_is_a_policy_error(self):
        with pytest.raises(ConfigError, match="no unit"):
            QualityCoordinator(small_policy(units={})).evaluate_gate("accuracy", 1.0)

    @pytest.mark.parametrize(
        "name", ["gates", "gates.speed", "gates.a.b.at_least", "gates.a.near", "gates.a.equal"]
    )
    def test_a_threshold_that_is_no_limit_is_a_policy_error(self, name):
        """In a policy.json anything may stand; it was an internal error."""
        policy = small_policy(thresholds={"gates.accuracy.at_least": 0.85, name: 1.0})
        with pytest.raises(ConfigError, match=f"'{name}' is no limit of a gate; expected gates"):
            QualityCoordinator(policy).evaluate({})

    def test_both_sides_of_a_gate_hold(self):
        policy = small_policy(
            thresholds={"gates.accuracy.at_least": 0.5, "gates.accuracy.at_most": 0.9}
        )
        coordinator = QualityCoordinator(policy)
        passed = [coordinator.evaluate_gate("accuracy", v).passed for v in (0.4, 0.5, 0.9, 0.95)]
        assert passed == [False, True, True, False]


class TestEvaluate:
    def outcomes(self, evidence, policy=None):
        results = QualityCoordinator(policy or small_policy()).evaluate(evidence)
        return {result.gate: str(result.outcome) for result in results}

    def test_every_gate_is_listed(self):
        assert self.outcomes({}) == {"accuracy": "not_measured", "latency": "not_measured"}
        assert self.outcomes([]) == self.outcomes({})

    def test_a_mapping(self):
        found = self.outcomes({"accuracy": (0.9, "1"), "latency": (90, "ms")})
        assert found == {"accuracy": "pass", "latency": "error"}
        with pytest.raises(ConfigError, match="Unknown gate"):
            self.outcomes({"speed": (1.0, "1")})

    def test_the_worst_of_several_counts(self):
        rows = [v for value in (0.99, 0.84, 0.99) for v in item("gates.accuracy", value).evidence]
        assert self.outcomes(rows)["accuracy"] == "fail"
        assert self.outcomes(rows[::2])["accuracy"] == "pass"

    @pytest.mark.parametrize("order", [1, -1])
    def test_of_several_that_end_alike_the_one_nearest_to_the_limit_counts(self, order):
        for values, worst in (((0.99, 0.86, 0.9), 0.86), ((0.1, 0.8, 0.2), 0.1)):
            given = values[::order]
            rows = [v for value in given for v in item("gates.accuracy", value).evidence]
            (found,) = (r for r in QualityCoordinator(small_policy()).evaluate(rows) if r.value)
            assert found.value == worst

    def test_nan_does_not_average_away(self):
        rows = [v for value in (0.99, "nan") for v in item("gates.accuracy", value).evidence]
        assert self.outcomes(rows)["accuracy"] == "fail"

    def test_a_run(self):
        assert self.outcomes(run_of()) == {"accuracy": "pass", "latency": "pass"}
        assert self.outcomes(run_of(accuracy=0.8))["accuracy"] == "fail"
        assert self.outcomes(run_of(accuracy=None))["accuracy"] == "not_measured"

    def test_a_gate_is_never_greener_than_its_check(self):
        coordinator = QualityCoordinator(small_policy())
        items = [
            item("gates.accuracy", 0.9, outcome="fail"),
            item("gates.latency", 0.1, unit="s", outcome="not_measured"),
        ]
        record = coordinator.assemble(items, context=context())
        assert self.outcomes(record) == {"accuracy": "fail", "latency": "not_measured"}
        broke = [item("gates.accuracy", outcome="error"), item("gates.latency", outcome="flaky")]
        record = coordinator.assemble(broke, context=context())
        assert self.outcomes(record) == {"accuracy": "fail", "latency": "not_measured"}

    def test_evidence_of_another_policy_is_stale(self):
        strict = small_policy(thresholds={**small_policy().thresholds, "x.y": 1.0})
        results = QualityCoordinator(strict).evaluate(run_of())
        assert {r.outcome for r in results} == {Outcome.NOT_MEASURED}
        assert all("another policy" in r.reason for r in results)

    def test_evaluating_leaves_no_trace(self):
        coordinator = QualityCoordinator(small_policy())
        first = coordinator.evaluate({"accuracy": (0.9, "1")})
        coordinator.evaluate({"accuracy": (0.1, "1")})
        assert coordinator.evaluate({"accuracy": (0.9, "1")}) == first


class TestBaseline:
    def compare(self, record, baseline):
        return QualityCoordinator(small_policy(), baseline=baseline).compare_baseline(record)

    def test_equal_runs(self):
        comparison = self.compare(run_of(), run_of())
        assert comparison.comparable
        assert comparison.regressions == ()
        assert [row.gate for row in comparison.rows] == ["score", "accuracy", "latency"]

    @pytest.mark.parametrize(
        ("accuracy", "latency", "lost"),
        [
            (0.99 * 0.98 + 1e-9, 0.05, []),
            (0.99 * 0.98 - 1e-9, 0.05, ["accuracy"]),
            (0.999, 0.05 * 2, []),
            (1.0, 0.001, []),
        ],
    )
    def test_worse_beyond_the_tolerance(self, accuracy, latency, lost):
        comparison = self.compare(run_of(accuracy, latency), run_of(0.99, 0.05))
        assert [row.gate for row in comparison.regressions] == lost

    def test_times_of_two_runs_are_shown_and_not_judged(self):
        comparison = self.compare(run_of(latency=0.09), run_of(latency=0.05))
        row = next(row for row in comparison.rows if row.gate == "latency")
        assert (row.outcome, row.value, row.limits) == (Outcome.NOT_MEASURED, 0.09, ())
        assert "is a time" in row.reason

    def test_a_lost_measurement_is_no_improvement(self):
        comparison = self.compare(run_of(accuracy=None), run_of())
        row = next(row for row in comparison.rows if row.gate == "accuracy")
        assert row.outcome is Outcome.NOT_MEASURED
        assert "score" in [lost.gate for lost in comparison.regressions]

    @pytest.mark.parametrize(
        ("value", "outcome", "lost", "code"),
        [
            (None, Outcome.NOT_MEASURED, ["accuracy"], 7),
            ("nan", Outcome.FAIL, [], 1),
            ("many", Outcome.ERROR, [], 1),
        ],
    )
    def test_a_value_that_only_the_baseline_has_is_never_green(self, value, outcome, lost, code):
        """A gate of medium severity costs less than the points that the score may fall."""
        policy = small_policy(thresholds=small_policy().thresholds | {_DROP: 100})
        record, before = run_of(accuracy=value, policy=policy), run_of(policy=policy)
        comparison = QualityCoordinator(policy).compare_baseline(record, before)
        row = next(row for row in comparison.rows if row.gate == "accuracy")
        assert row.outcome is outcome
        assert "has no value, the baseline has 0.9" in row.reason
        assert [side.limit for side in row.limits] == [0.9 * 0.98]
        assert [row.gate for row in comparison.lost] == lost
        compared = gate.compare(record, policy, QualityCoordinator(policy).baseline_of(before))
        assert compared.code_with(ExitCode.PASS, "") == code
        assert not compared.lines[0].startswith("Not worse")

    @pytest.mark.parametrize(
        ("outcome", "value", "ended", "code"),
        [
            ("error", 0.9, Outcome.FAIL, 1),
            ("error", None, Outcome.FAIL, 1),
            ("fail", 0.9, Outcome.FAIL, 1),
            ("flaky", 0.9, Outcome.NOT_MEASURED, 7),
            ("not_measured", 0.9, Outcome.NOT_MEASURED, 7),
            ("pass", 0.9, Outcome.PASS, 0),
        ],
    )
    def test_a_check_that_broke_beside_its_value_is_worse(self, outcome, value, ended, code):
        """One that broke after it was "Not worse", and one that broke before it ended with 7."""
        policy = small_policy(thresholds=small_policy().thresholds | {_DROP: 100})
        coordinator = QualityCoordinator(policy)
        items = [item("gates.accuracy", value, outcome=outcome)]
        items += [item("gates.latency", 0.05, unit="s")]
        record = coordinator.assemble(items, context=context())
        before = coordinator.baseline_of(run_of(policy=policy))
        (row,) = (
            r for r in coordinator.compare_baseline(record, before).rows if r.gate in items[0].check
        )
        assert row.outcome is ended
        assert ("the baseline has 0.9" in row.reason) is (code != 0)
        compared = gate.compare(record, policy, before)
        assert compared.code_with(ExitCode.PASS, "") == code
        again = gate.compare(record, policy, coordinator.baseline_of(record))
        assert again.code_with(ExitCode.PASS, "") == 0, "a run is not worse than itself"

    def test_a_waived_check_is_held_against_the_baseline_by_its_value(self):
        policy = small_policy(thresholds=small_policy().thresholds | {_DROP: 100})
        waiver = Waiver(
            check="gates.accuracy", owner="ann", reason="known", issue="#7", expires="2026-12-31"
        )
        coordinator = QualityCoordinator(policy, [waiver])
        for value, code in ((0.9, 0), (0.8, 1)):
            items = [item("gates.accuracy", value, outcome="error")]
            record = coordinator.assemble(items, context=context())
            assert record.checks[0].outcome is Outcome.XFAIL
            compared = gate.compare(record, policy, coordinator.baseline_of(run_of(policy=policy)))
            assert compared.code_with(ExitCode.PASS, "fail") == code

    @pytest.mark.parametrize("values", [(0.99, 0.9), (0.9, 0.99)])
    def test_of_two_passing_values_the_worse_is_held_against_the_baseline(self, values):
        policy = small_policy()
        items = [item("gates.accuracy", value) for value in values]
        items = [each.model_copy(update={"nodeid": f"t::{n}"}) for n, each in enumerate(items)]
        record = QualityCoordinator(policy).assemble(items, context=context())
        (row,) = (
            row for row in self.compare(record, run_of(0.99)).regressions if row.gate == "accuracy"
        )
        assert row.value == 0.9

    def test_missing_values_can_be_accepted_and_red_ones_cannot(self):
        policy = small_policy(thresholds=small_policy().thresholds | {_DROP: 100})
        before = QualityCoordinator(policy).baseline_of(run_of(policy=policy))
        for value, code in ((None, 0), ("nan", 1)):
            compared = gate.compare(run_of(accuracy=value, policy=policy), policy, before)
            assert compared.code_with(ExitCode.PASS, "fail") == code

    def test_a_time_that_is_missing_is_not_judged_either(self):
        comparison = self.compare(run_of(latency=None), run_of())
        assert comparison.lost == ()
        assert [row.gate for row in comparison.regressions] == ["score"]

    def test_a_value_the_baseline_lacks(self):
        comparison = self.compare(run_of(), run_of(latency=None))
        row = next(row for row in comparison.rows if row.gate == "latency")
        assert (row.outcome, row.reason) == (
            Outcome.NOT_MEASURED,
            "the baseline has no value of latency",
        )

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"environment": {**MACHINE, "cpu": "EPYC"}}, "machine class"),
            ({"environment": {}}, "does not say what machine"),
            ({"policy": small_policy(suite_weights={"gates": 11})}, "policies differ"),
            (
                {"subject": SubjectRecord(spec="mine:s", name="s", capabilities=[])},
                "subject is 'reference'",
            ),
            (
                {"declared": {"accelerator": "none"}},
                "the run declares nothing, the baseline accelerator = none",
            ),
        ],
    )
    def test_what_does_not_compare(self, fields, reason):
        comparison = self.compare(run_of(), run_of(**fields))
        assert not comparison.comparable
        assert reason in comparison.reason
        assert comparison.rows == ()

    def test_a_selection_is_no_baseline_of_a_whole_run(self):
        coordinator = QualityCoordinator(small_policy())
        items = [item("gates.accuracy", 0.5)]
        part = coordinator.assemble(
            items, context=context(), scope=Scope(checks=("gates.accuracy",))
        )
        comparison = self.compare(run_of(), part)
        assert not comparison.comparable
        assert comparison.reason == "the run covers the whole profile, the baseline gates.accuracy"
        assert self.compare(part, part).comparable

    def test_no_baseline(self):
        comparison = QualityCoordinator(small_policy()).compare_baseline(run_of())
        assert (comparison.comparable, comparison.reason) == (False, "there is no baseline")

    def test_the_machine_class_needs_all_its_parts(self):
        assert machine_class(MACHINE) == "Linux/x86_64/Xeon/2"
        assert machine_class({**MACHINE, "cpu": None}) is None


class TestVerdict:
    def test_a_good_run(self):
        decision = QualityCoordinator(small_policy(), baseline=run_of()).verdict(run_of())
        assert (decision.verdict, decision.reasons) == ("PASS", ())

    def test_the_stored_verdict_is_not_trusted(self):
        bad = QualityCoordinator(small_policy()).assemble(
            [item("gates.accuracy", 0.9, outcome="fail")], context=context()
        )
        forged = bad.model_copy(update={"verdict": "PASS", "verdict_reasons": []})
        assert QualityCoordinator(small_policy()).verdict(forged).verdict == "FAIL"

    def test_a_regression_fails(self):
        coordinator = QualityCoordinator(small_policy(), baseline=run_of(accuracy=0.99))
        decision = coordinator.verdict(run_of(accuracy=0.9))
        assert decision.verdict == "FAIL"
        assert decision.reasons[0].endswith("the baseline has 0.99")

    def test_a_value_that_only_the_baseline_has_leaves_it_open(self):
        low = {"severity": Severity.LOW}
        policy = small_policy(
            thresholds=small_policy().thresholds | {_DROP: 100},
            catalogue=[entry.model_copy(update=low) for entry in small_policy().catalogue],
        )
        coordinator = QualityCoordinator(policy, baseline=run_of(policy=policy))
        decision = coordinator.verdict(run_of(accuracy=None, policy=policy))
        assert decision.verdict == "INCOMPLETE"
        assert decision.reasons[0].startswith("accuracy has no value, the baseline has 0.9")

    def test_a_baseline_that_does_not_compare_leaves_it_open(self):
        other = run_of(environment={**MACHINE, "cpu": "EPYC"})
        decision = QualityCoordinator(small_policy(), baseline=other).verdict(run_of())
        assert decision.verdict == "INCOMPLETE"
        assert decision.reasons[0].startswith("the baseline does not compare: the machine class")

    def test_stale_evidence_leaves_it_open(self):
        strict = small_policy(suite_weights={"gates": 11})
        assert QualityCoordinator(strict).verdict(run_of()).verdict == "INCOMPLETE"

    def test_the_ledger_of_the_coordinator_counts(self):
        failed = QualityCoordinator(small_policy()).assemble(
            [item("gates.accuracy", 0.9, outcome="fail"), item("gates.latency", 0.1, unit="s")],
            context=context(),
        )
        waiver = Waiver(
            check="gates.accuracy", owner="ann", reason="known", issue="#7", expires="2026-12-31"
        )
        excused = QualityCoordinator(small_policy(), [waiver]).verdict(failed)
        assert excused.record.checks[0].outcome is Outcome.XFAIL
        assert not any("critical check" in reason for reason in excused.reasons)
        assert QualityCoordinator(small_policy()).verdict(failed).verdict == "FAIL"


def test_importing_it_loads_neither_numpy_nor_torch():
    import subprocess
    import sys

    code = (
        "import sys, forge_harness.integration.quality_coordinator;"
        "assert not {'numpy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
