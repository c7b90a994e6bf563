"""Gates decide right at their limits, and nothing but a measured good value is green."""

from __future__ import annotations

import math
import operator

import pytest

from forge_harness.scoring import gate_exit_code

NON_FINITE = (math.nan, math.inf, -math.inf, "nan", "inf", "-inf")
OTHER_UNITS = ("", "%", "ms", "s", "ns", "1", "MB", "GiB", "GB", "bytes", "parameters", "M", "x")
AS_STATED = {"at_least": operator.ge, "at_most": operator.le}


@pytest.mark.forge_check("gates.boundary_semantics")
def test_values_around_every_limit(quality_coordinator, policy, gates, wrong, evidence):
    """At, one float under and one float over every limit; oracle: the comparison the key names."""
    coordinator = quality_coordinator(policy)
    evidence.at_least("gates", len(gates), limit=1, reason="a policy without gates decides nothing")
    for gate in gates:
        beyond = {
            math.nextafter(gate.limit, -math.inf),
            gate.limit,
            math.nextafter(gate.limit, math.inf),
            # What rounding to the digits of a report would turn into the limit.
            *(gate.limit * (1 + share) for share in (-4e-4, -1e-9, 1e-9, 4e-4)),
            # Far from the limit, and where text sorts otherwise than numbers do.
            *(gate.limit * factor for factor in (-1.0, 0.0, 0.09, 0.5, 2.0, 10.0)),
        }
        for value in sorted(beyond):
            expected = AS_STATED[gate.direction](value, gate.limit)
            found = coordinator.evaluate_gate(gate.name, value, gate.unit).passed
            wrong.expect(
                f"{gate.name} at {value!r}, {gate.direction} {gate.limit!r}", found, expected
            )
    wrong.settle(evidence, "the limit itself is good, the next float beyond it is not")


@pytest.mark.forge_check("gates.non_finite_fails")
def test_non_finite_values_fail(quality_coordinator, policy, gates, trial, wrong, evidence):
    """NaN and infinities, alone and among good values, as numbers and as evidence writes them."""
    coordinator = quality_coordinator(policy)
    for gate in gates:
        good = gate.better(0.01)
        for value in NON_FINITE:
            one = coordinator.evaluate_gate(gate.name, value, gate.unit)
            wrong.expect(f"{gate.name} at {value}", str(one.outcome), "fail")
            rows = [trial.evidence(gate.name, v, gate.unit) for v in (good, good, good)]
            # Evidence writes non-finite numbers as text: JSON has no word for them.
            rows.insert(1, trial.evidence(gate.name, str(value), gate.unit))
            among = {r.gate: str(r.outcome) for r in coordinator.evaluate(rows)}
            wrong.expect(f"{gate.name} at {value} among good values", among[gate.name], "fail")
    for value in ("nan", "inf", "-inf"):
        item = trial.item("trial.x", evidence=[trial.evidence("loss", value)])
        record = quality_coordinator(trial.policy(("trial.x", "low"))).assemble(
            [item], context=trial.context()
        )
        wrong.expect(f"a check that recorded {value}", str(record.checks[0].outcome), "fail")
    wrong.settle(evidence, "a comparison with NaN is false, which must not read as within limits")


@pytest.mark.forge_check("gates.missing_fails")
def test_missing_values_are_never_green(quality_coordinator, policy, gates, wrong, evidence):
    """Each gate's value is left out in turn; exactly that gate must not be green."""
    coordinator = quality_coordinator(policy)
    good = {gate.name: (gate.better(0.01), gate.unit) for gate in gates}
    for what, values in (("an empty list", []), ("an empty mapping", {})):
        green = [result.gate for result in coordinator.evaluate(values) if result.passed]
        wrong.expect(f"gates green on {what}", green, [])
    for gate in gates:
        wrong.expect(
            f"{gate.name} without a value",
            str(coordinator.evaluate_gate(gate.name, None, gate.unit).outcome),
            "not_measured",
        )
        rest = {name: pair for name, pair in good.items() if name != gate.name}
        green = {result.gate for result in coordinator.evaluate(rest) if result.passed}
        wrong.expect(f"gates green without {gate.name}", green, set(rest))
    wrong.settle(evidence, "a gate without evidence is listed, and is not green")


@pytest.mark.forge_check("gates.missing_fails")
@pytest.mark.parametrize("severity", ["critical", "high", "medium", "low"])
def test_missing_results_never_help(quality_coordinator, trial, wrong, evidence, severity):
    """One of four equal checks is deleted, skipped or emptied; 3/4 of the score remains proved."""
    names = [f"trial.c{i}" for i in range(4)]
    coordinator = quality_coordinator(trial.policy(*((name, severity) for name in names)))

    def run(items):
        return coordinator.assemble(items, context=trial.context())

    whole = [trial.item(name) for name in names]
    wrong.expect("a complete run", (str(run(whole).verdict), run(whole).score.low), ("PASS", 100))
    poorer = {
        "deleted": whole[:-1],
        "skipped": [*whole[:-1], trial.item(names[-1], "not_measured")],
        "without evidence": [*whole[:-1], trial.item(names[-1], evidence=[])],
        "declared not applicable by itself": [*whole[:-1], trial.item(names[-1], "not_applicable")],
    }
    for what, items in poorer.items():
        record = run(items)
        wrong.expect(f"verdict with one check {what}", str(record.verdict), "INCOMPLETE")
        wrong.expect(f"low score with one check {what}", record.score.low, 75)
        wrong.expect(f"coverage with one check {what}", record.coverage, 0.75)
    nothing = run([])
    wrong.expect("verdict of nothing", str(nothing.verdict), "INCOMPLETE")
    wrong.expect("score of nothing", (nothing.score.low, nothing.coverage), (0, 0.0))
    wrong.settle(evidence, "what was not measured stays in the denominator")


@pytest.mark.forge_check("gates.missing_fails")
def test_stale_results_are_missing(quality_coordinator, policy, gates, trial, wrong, evidence):
    """A threshold is raised after the run; its evidence must not count under the new policy."""
    checks = [(f"gates.{gate.name}", "medium") for gate in gates]
    then = trial.policy(*checks, like=policy)
    items = [trial.gate_item(gate, gate.better(0.01)) for gate in gates]
    record = quality_coordinator(then).assemble(items, context=trial.context())
    fresh = [result.passed for result in quality_coordinator(then).evaluate(record)]
    wrong.expect("gates under the policy they were judged by", fresh, [True] * len(gates))
    values = then.to_json()
    values["thresholds"]["gates.accuracy.at_least"] += 1.0
    stricter = type(policy).model_validate(values)
    stale = [result.passed for result in quality_coordinator(stricter).evaluate(record)]
    wrong.expect("gates under a policy changed since", any(stale), False)
    verdict = quality_coordinator(stricter).verdict(record).verdict
    wrong.expect("verdict under a policy changed since", str(verdict), "INCOMPLETE")
    wrong.settle(evidence, "evidence judged by another policy is no evidence of this one")


@pytest.mark.forge_check("gates.units_checked")
def test_other_units_are_refused(quality_coordinator, policy, gates, trial, wrong, evidence):
    """A good value in each of a dozen other units is an error, in its own unit a pass."""
    coordinator = quality_coordinator(policy)
    without = [gate.name for gate in gates if not gate.unit]
    evidence.equal("gates_without_unit", len(without), expected=0, reason="a bare limit is a guess")
    for gate in gates:
        good = gate.better(0.01)
        stated = coordinator.evaluate_gate(gate.name, good, gate.unit)
        wrong.expect(f"{gate.name} in {gate.unit!r}", str(stated.outcome), "pass")
        for unit in OTHER_UNITS:
            if unit == gate.unit:
                continue
            found = coordinator.evaluate_gate(gate.name, good, unit)
            wrong.expect(f"{gate.name} in {unit!r}", str(found.outcome), "error")
            listed = coordinator.evaluate([trial.evidence(gate.name, good, unit)])
            among = {result.gate: result.passed for result in listed}
            wrong.expect(f"evidence of {gate.name} in {unit!r}", among[gate.name], False)
    wrong.settle(evidence, "a limit in seconds met by milliseconds is a thousand times too loose")


@pytest.mark.forge_check("gates.every_gate_can_fail")
def test_one_fault_turns_one_gate_red(quality_coordinator, policy, gates, trial, wrong, evidence):
    """From items to exit code: one value 1 % beyond its limit, all others 1 % inside."""
    severity = {entry.id: entry.severity for entry in policy.catalogue}
    checks = [(f"gates.{g.name}", severity.get(f"gates.{g.name}", "high")) for g in gates]
    coordinator = quality_coordinator(trial.policy(*checks, like=policy))
    healthy = {gate.name: trial.gate_item(gate, gate.better(0.01)) for gate in gates}

    def run(items):
        record = coordinator.assemble(list(items.values()), context=trial.context())
        red = {result.gate for result in coordinator.evaluate(record) if not result.passed}
        failed = {check.id for check in record.checks if check.outcome == "fail"}
        return record, red, failed

    record, red, failed = run(healthy)
    wrong.expect("a healthy run", (str(record.verdict), red, failed), ("PASS", set(), set()))
    wrong.expect("exit code of a healthy run", int(gate_exit_code(record)), 0)
    for gate in gates:
        faulty = {**healthy, gate.name: trial.gate_item(gate, gate.worse(0.01))}
        record, red, failed = run(faulty)
        wrong.expect(f"gates red with a fault in {gate.name}", red, {gate.name})
        wrong.expect(f"checks failed with a fault in {gate.name}", failed, {f"gates.{gate.name}"})
        blocks = dict(checks)[f"gates.{gate.name}"] in ("critical", "high")
        wrong.expect(f"exit with a fault in {gate.name}", int(gate_exit_code(record)) == 1, blocks)
    wrong.settle(evidence, "each gate sees its own fault, and only its own")
