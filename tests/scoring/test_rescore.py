"""A stored run under another policy: what is judged again, what stands, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness.errors import ConfigError
from forge_harness.integration.quality_coordinator import QualityCoordinator
from forge_harness.rundir import read_items, read_policy, read_record
from forge_harness.scoring import Scope, assemble, items_of, rescore
from forge_harness.scoring.rollup import missed_limit
from forge_harness.types import Outcome, Severity

EXAMPLE = Path(__file__).parents[2] / "reports" / "example"
CHECKS = (
    ("gates.accuracy", "high"),
    ("gates.latency", "medium"),
    ("data.alpha", "critical"),
    ("data.beta", "low"),
)
UNITS = {"gates.accuracy": "1", "gates.latency": "s"}


def policy_of(make, accuracy=0.8, latency=0.5, checks=CHECKS, **thresholds):
    limits = {"gates.accuracy.at_least": accuracy, "gates.latency.at_most": latency}
    limits |= {name.replace("__", "."): value for name, value in thresholds.items()}
    kept = {name: limit for name, limit in limits.items() if limit is not None}
    return make.policy(*checks).model_copy(update={"thresholds": kept, "units": UNITS})


def gate_item(make, gate, value, policy, *, more=(), level="fail", **fields):
    """What the check of a gate leaves: its value held against the limit of the policy."""
    key = next(name for name in policy.thresholds if name.startswith(f"gates.{gate}."))
    held = make.evidence(
        "",
        gate,
        value,
        unit=policy.units[f"gates.{gate}"],
        limit=policy.thresholds[key],
        direction=key.rpartition(".")[2],
        level=level,
    )
    evidence = [held, *more]
    missed = next(filter(None, map(missed_limit, evidence)), None)
    worst = "warn" if level == "warn" else "fail"
    fields = {"outcome": worst if missed else "pass", "reason": missed or "", **fields}
    return make.item(f"gates.{gate}", evidence=evidence, **fields)


def run_of(make, policy, items, **fields):
    return assemble(policy, items, scope=Scope(), context=make.context(), **fields)


def outcome_of(record, check):
    return next(found.outcome for found in record.checks if found.id == check)


def change(policy, check, **fields):
    """A policy in which one entry of the catalogue is another."""
    entries = (e.model_copy(update=fields) if e.id == check else e for e in policy.catalogue)
    return policy.model_copy(update={"catalogue": tuple(entries)})


class TestGates:
    def test_a_value_that_misses_the_new_limit_fails(self, make):
        old, new = policy_of(make), policy_of(make, accuracy=0.95)
        run = run_of(make, old, [gate_item(make, "accuracy", 0.9, old)])
        again = rescore(run, old, new)
        assert outcome_of(run, "gates.accuracy") is Outcome.PASS
        assert outcome_of(again.record, "gates.accuracy") is Outcome.FAIL
        assert again.record.policy_digest == new.digest
        assert "gates.accuracy.at_least 0.8 -> 0.95: judged again, pass -> fail." in again.notes

    def test_the_limit_itself_passes(self, make):
        old, new = policy_of(make), policy_of(make, accuracy=0.9, latency=0.25)
        items = [gate_item(make, "accuracy", 0.9, old), gate_item(make, "latency", 0.25, old)]
        again = rescore(run_of(make, old, items), old, new, items)
        assert outcome_of(again.record, "gates.accuracy") is Outcome.PASS
        assert outcome_of(again.record, "gates.latency") is Outcome.PASS

    def test_what_only_the_old_limit_failed_passes(self, make):
        old, new = policy_of(make), policy_of(make, accuracy=0.6)
        items = [gate_item(make, "accuracy", 0.7, old)]
        run = run_of(make, old, items)
        again = rescore(run, old, new, items)
        assert outcome_of(run, "gates.accuracy") is Outcome.FAIL
        assert outcome_of(again.record, "gates.accuracy") is Outcome.PASS
        assert "gates.accuracy.at_least 0.8 -> 0.6: judged again, fail -> pass." in again.notes

    def test_the_coordinator_says_the_same(self, make):
        old, new = policy_of(make), policy_of(make, accuracy=0.6, latency=0.1)
        items = [gate_item(make, "accuracy", 0.7, old), gate_item(make, "latency", 0.25, old)]
        again = rescore(run_of(make, old, items), old, new, items)
        results = {r.gate: r.outcome for r in QualityCoordinator(new).evaluate(again.record)}
        assert results == {"accuracy": Outcome.PASS, "latency": Outcome.FAIL}

    def test_without_what_was_reported_a_failure_stands(self, make):
        old, new = policy_of(make), policy_of(make, accuracy=0.6)
        run = run_of(make, old, [gate_item(make, "accuracy", 0.7, old)])
        assert outcome_of(rescore(run, old, new).record, "gates.accuracy") is Outcome.FAIL

    @pytest.mark.parametrize(
        "told", [("error", "KeyError: 'x'"), ("fail", "assert False"), ("not_measured", "no GPU")]
    )
    def test_what_also_ended_otherwise_does_not_pass(self, make, told):
        old, new = policy_of(make), policy_of(make, accuracy=0.6)
        items = [gate_item(make, "accuracy", 0.7, old, outcome=told[0], reason=told[1])]
        again = rescore(run_of(make, old, items), old, new, items)
        assert outcome_of(again.record, "gates.accuracy") is Outcome(told[0])

    def test_another_missed_limit_still_fails(self, make):
        old, new = policy_of(make), policy_of(make, accuracy=0.6)
        other = make.evidence("", "control", 3.0, limit=2.0, direction="at_most")
        items = [gate_item(make, "accuracy", 0.7, old, more=[other])]
        again = rescore(run_of(make, old, items), old, new, items)
        assert outcome_of(again.record, "gates.accuracy") is Outcome.FAIL

    def test_a_second_attempt_stays_flaky(self, make):
        old, new = policy_of(make), policy_of(make, accuracy=0.6)
        items = [gate_item(make, "accuracy", 0.7, old, attempts=2)]
        again = rescore(run_of(make, old, items), old, new, items)
        assert outcome_of(again.record, "gates.accuracy") is Outcome.FLAKY

    def test_a_reason_that_was_cut_is_known(self, make):
        old, new = policy_of(make), policy_of(make, accuracy=0.6)
        [item] = [gate_item(make, "accuracy", 0.7, old)]
        items = [item.model_copy(update={"reason": f"{item.reason[:20]}…"})]
        again = rescore(run_of(make, old, items), old, new, items)
        assert outcome_of(again.record, "gates.accuracy") is Outcome.PASS

    def test_a_warning_is_lifted_and_comes(self, make):
        old = policy_of(make)
        items = [gate_item(make, "latency", 0.6, old, level="warn")]
        run = run_of(make, old, items)
        milder = rescore(run, old, policy_of(make, latency=0.7), items)
        assert outcome_of(run, "gates.latency") is Outcome.WARN
        assert outcome_of(milder.record, "gates.latency") is Outcome.PASS

    @pytest.mark.parametrize("fields", [{"limit": 0.5}, {"limit": None, "direction": "record"}])
    @pytest.mark.parametrize(
        ("value", "accuracy", "outcome"),
        [(0.9, 0.95, "fail"), (0.9, 0.85, "pass"), (0.7, 0.95, "pass"), (0.7, 0.75, "pass")],
    )
    def test_a_check_with_a_limit_of_its_own(self, make, fields, value, accuracy, outcome):
        """The policy's limit comes on top; where a miss of the old one was minded by nobody, none
        of the new one is either."""
        old, new = policy_of(make), policy_of(make, accuracy=accuracy)
        own = {"direction": "at_least", **fields}
        items = [
            make.item("gates.accuracy", evidence=[make.evidence("", "accuracy", value, **own)])
        ]
        again = rescore(run_of(make, old, items), old, new, items)
        assert outcome_of(again.record, "gates.accuracy") is Outcome(outcome)

    def test_a_value_in_another_unit_is_not_measured(self, make):
        old = policy_of(make)
        new = policy_of(make, latency=500.0).model_copy(
            update={"units": {**UNITS, "gates.latency": "ms"}}
        )
        items = [gate_item(make, "latency", 0.25, old)]
        again = rescore(run_of(make, old, items), old, new, items)
        (found,) = (c for c in again.record.checks if c.id == "gates.latency")
        assert found.outcome is Outcome.NOT_MEASURED
        assert found.reason == "latency is in 's', its new limit in 'ms'; run again"
        assert (
            "gates.latency.at_most 0.5 -> 500 (s -> ms): judged again, pass -> not_measured."
            in (again.notes)
        )

    def test_the_same_number_of_another_unit_is_another_limit(self, make):
        old = policy_of(make)
        new = old.model_copy(update={"units": {**UNITS, "gates.latency": "ms"}})
        items = [gate_item(make, "latency", 0.25, old)]
        again = rescore(run_of(make, old, items), old, new, items)
        assert outcome_of(again.record, "gates.latency") is Outcome.NOT_MEASURED

    @pytest.mark.parametrize(("value", "outcome"), [(0.7, "fail"), (0.9, "pass")])
    def test_a_limit_that_is_gone_stands(self, make, value, outcome):
        old, new = policy_of(make), policy_of(make, accuracy=None)
        items = [gate_item(make, "accuracy", value, old)]
        again = rescore(run_of(make, old, items), old, new, items)
        assert outcome_of(again.record, "gates.accuracy") is Outcome(outcome)
        assert "gates.accuracy.at_least 0.8 -> none: judged by the limit of the run." in again.notes

    def test_a_limit_that_is_new_counts(self, make):
        old, new = policy_of(make, accuracy=None), policy_of(make)
        value = make.evidence("", "accuracy", 0.7)
        items = [make.item("gates.accuracy", evidence=[value])]
        again = rescore(run_of(make, old, items), old, new, items)
        assert outcome_of(again.record, "gates.accuracy") is Outcome.FAIL

    def test_a_gate_without_a_value_is_said(self, make):
        old, new = policy_of(make), policy_of(make, accuracy=0.9)
        run = run_of(make, old, [make.item("gates.accuracy", "not_measured")])
        assert rescore(run, old, new).notes == (
            "gates.accuracy.at_least 0.8 -> 0.9: the run has no value of accuracy, "
            "still not_measured.",
        )

    @pytest.mark.parametrize(("accuracy", "outcome"), [(0.9, "not_measured"), (0.7, "pass")])
    def test_without_its_value_a_gate_passes_no_stricter_limit(self, make, accuracy, outcome):
        old, new = policy_of(make), policy_of(make, accuracy=accuracy)
        run = run_of(make, old, [make.item("gates.accuracy")])
        assert outcome_of(rescore(run, old, new).record, "gates.accuracy") is Outcome(outcome)


class TestOtherLimits:
    def test_nobody_knows_who_reads_them(self, make):
        old = policy_of(make, data__alpha__at_most=1.0)
        new = policy_of(make, data__alpha__at_most=2.0, baseline__score_drop__at_most=2.0)
        run = run_of(make, old, [make.item("data.alpha")])
        assert rescore(run, old, new).notes == (
            "Judged by the limits of the run: baseline.score_drop.at_most none -> 2; "
            "data.alpha.at_most 1 -> 2; run again to judge by the new ones.",
        )

    def test_evidence_that_has_the_limit_of_a_changed_gate_is_named(self, make):
        old, new = policy_of(make), policy_of(make, accuracy=0.9)
        shared = make.evidence("", "rate", 0.85, limit=0.8, direction="at_least")
        run = run_of(make, old, [make.item("data.beta", evidence=[shared])])
        again = rescore(run, old, new)
        assert outcome_of(again.record, "data.beta") is Outcome.PASS
        assert again.notes[1] == (
            "Judged by the limit of the run, which may be that of gates.accuracy: data.beta rate; "
            "run again to judge by the new one."
        )

    def test_a_unit_of_another_limit_is_said(self, make):
        old = policy_of(make, data__alpha__at_most=1.0)
        new = old.model_copy(update={"units": {**UNITS, "data.alpha": "ms"}})
        (note,) = rescore(run_of(make, old, []), old, new).notes
        assert "unit of data.alpha none -> ms" in note

    def test_a_computed_check_is_computed_again(self, make):
        checks = (*CHECKS, ("gates.share", "high"))
        old, new = (
            change(
                policy_of(make, checks=checks, gates__share__at_least=limit),
                "gates.share",
                measures_suite="data",
            )
            for limit in (0.5, 0.95)
        )
        # By hand: 8 of 9 points of severity.
        items = [make.item("data.alpha"), make.item("data.beta", "fail")]
        run = run_of(make, old, items)
        again = rescore(run, old, new, items)
        assert outcome_of(run, "gates.share") is Outcome.PASS
        assert outcome_of(again.record, "gates.share") is Outcome.FAIL
        assert again.notes == (
            "Computed again from the checks of the run: gates.share.at_least 0.5 -> 0.95.",
        )

    def test_a_weight_of_no_suite_is_said(self, make):
        old = policy_of(make)
        new = old.model_copy(update={"suite_weights": {**old.suite_weights, "dtaa": 9}})
        (note,) = rescore(run_of(make, old, []), old, new).notes
        assert note == "No check of the new policy is in suite dtaa."


class TestCatalogue:
    def test_a_check_it_does_not_have_is_left_out_and_blocks_nothing(self, make):
        old, new = policy_of(make), policy_of(make, checks=CHECKS[:3])
        run = run_of(make, old, [make.item("data.alpha"), make.item("data.beta", "fail")])
        again = rescore(run, old, new)
        assert again.record.unscored_items == []
        assert "data.beta" not in {check.id for check in again.record.checks}
        assert again.notes == ("Left out, the new policy does not have them in scope: data.beta.",)

    def test_a_new_check_is_not_measured(self, make):
        old, new = policy_of(make), policy_of(make, checks=(*CHECKS, ("data.gamma", "high")))
        again = rescore(run_of(make, old, [make.item("data.alpha")]), old, new)
        assert outcome_of(again.record, "data.gamma") is Outcome.NOT_MEASURED
        assert again.notes == ("Not measured, the run did not have them in scope: data.gamma.",)

    @pytest.mark.parametrize("outcome", ["pass", "fail"])
    def test_another_version_is_not_measured(self, make, outcome):
        old = policy_of(make)
        new = change(old, "data.alpha", version=2)
        again = rescore(run_of(make, old, [make.item("data.alpha", outcome)]), old, new)
        (found,) = (check for check in again.record.checks if check.id == "data.alpha")
        assert (found.outcome, found.evidence) == (Outcome.NOT_MEASURED, [])
        assert found.reason == "measured as version 1 of the check, the policy has 2"
        assert again.notes == (
            "Not measured, their evidence has another meaning now: data.alpha (version 1 -> 2).",
        )

    def test_what_had_no_place_goes_on_blocking(self, make):
        old = policy_of(make)
        new = policy_of(make, checks=(*CHECKS, ("data.gamma", "high")))
        items = [make.item("data.gamma", "fail"), make.item("data.delta")]
        again = rescore(run_of(make, old, items), old, new)
        assert outcome_of(again.record, "data.gamma") is Outcome.FAIL
        assert [item.check for item in again.record.unscored_items] == ["data.delta"]
        assert again.record.verdict == "FAIL"

    def test_what_had_no_place_proves_nothing_in_a_new_one(self, make):
        old = policy_of(make)
        new = policy_of(make, checks=(*CHECKS, ("data.gamma", "high")))
        again = rescore(run_of(make, old, [make.item("data.gamma")]), old, new)
        assert outcome_of(again.record, "data.gamma") is Outcome.NOT_MEASURED

    def test_weights_and_severities_are_the_new_ones(self, make):
        old = policy_of(make)
        items = [make.item(check) for check, _ in CHECKS[:3]] + [make.item("data.beta", "fail")]
        weighted = old.model_copy(update={"suite_weights": {"gates": 10, "data": 30}})
        severe = change(old, "data.beta", severity=Severity.CRITICAL)
        run = run_of(make, old, items)
        # By hand: 100 and 8/9 of 100, halved; one to three; critical: 8/16, capped at 49.
        assert (run.score.low, rescore(run, old, weighted).record.score.low) == (94, 91)
        assert rescore(run, old, severe).record.score.low == 49

    def test_a_warning_of_a_check_that_is_less_severe_now(self, make):
        old = policy_of(make)
        items = [gate_item(make, "accuracy", 0.7, old, level="warn")]
        run = run_of(make, old, items)
        new = change(old, "gates.accuracy", severity=Severity.MEDIUM)
        assert outcome_of(run, "gates.accuracy") is Outcome.FAIL
        assert outcome_of(rescore(run, old, new, items).record, "gates.accuracy") is Outcome.WARN


def test_another_policy_than_that_of_the_run_is_refused(make):
    old, new = policy_of(make), policy_of(make, accuracy=0.9)
    with pytest.raises(ConfigError, match="was scored under policy"):
        rescore(run_of(make, old, []), new, old)


def test_the_commands_of_an_earlier_release_are_kept(make):
    policy = policy_of(make)
    run = run_of(make, policy, [make.item("data.alpha")])
    checks = [check.model_copy(update={"command": "as it was"}) for check in run.checks]
    earlier = run.model_copy(update={"checks": checks})
    assert rescore(earlier, policy, policy).record == earlier


def test_a_real_run_is_rescored_to_itself():
    record, policy = read_record(EXAMPLE), read_policy(EXAMPLE)
    again = rescore(record, policy, policy, read_items(EXAMPLE))
    assert (again.record, again.notes) == (record, ())


VALUES = st.sampled_from([0.5, 0.5, 0.5, 0.3, 0.6, 0.7, "nan"])
RARELY = st.sampled_from([False] * 5 + [True])
LIMITS = st.sampled_from([0.4, 0.6])
EXAMPLES = settings(max_examples=200)
"""Values mostly lie between the two limits, where each rule decides."""


@st.composite
def reported(draw, make, policy):
    """Items as pytest reports them: the outcome follows from the evidence, or from an exception."""
    # The rest of the run is sound: nothing there hides what becomes of the gates.
    items = [make.item("data.alpha"), make.item("data.beta")]
    gates = ["gates.accuracy", "gates.latency"]
    other = [check for check in ("data.beta", "data.unknown") if draw(RARELY)]
    for number, check in enumerate([*gates, *draw(st.sets(st.sampled_from(gates))), *other], 1):
        evidence = draw(evidence_of(make, policy, check))
        missed = [(e.level, missed_limit(e)) for e in evidence if missed_limit(e)]
        failed = [sentence for level, sentence in missed if level == "fail"]
        ended = draw(st.sampled_from(["clean"] * 9 + ["fail", "error", "not_measured"]))
        if ended != "clean":
            outcome, reason = ended, f"why {ended}"
        elif failed:
            outcome, reason = "fail", failed[0]
        elif missed:
            outcome, reason = "warn", missed[0][1]
        else:
            outcome, reason = "pass", ""
        attempts = 2 if draw(RARELY) else 1
        items.append(
            make.item(
                check, outcome, number=number, evidence=evidence, reason=reason, attempts=attempts
            )
        )
    return items


@st.composite
def evidence_of(draw, make, policy, check):
    found = []
    gate = check.partition(".")[2]
    if check.startswith("gates.") and not draw(RARELY):
        key = next(name for name in policy.thresholds if name.startswith(f"{check}."))
        own = draw(st.sampled_from([policy.thresholds[key]] * 3 + [0.4]))
        direction = draw(st.sampled_from([key.rpartition(".")[2]] * 4 + ["record"]))
        limit = None if direction == "record" else own
        level = draw(st.sampled_from(["fail", "fail", "warn"]))
        value = draw(VALUES)
        unit = policy.units[check]
        found.append(
            make.evidence("", gate, value, unit=unit, limit=limit, direction=direction, level=level)
        )
    for name in () if draw(RARELY) else ("first", "second"):
        level = draw(st.sampled_from(["fail", "warn"]))
        value = draw(VALUES) if draw(RARELY) else 0.1
        found.append(make.evidence("", name, value, limit=0.5, direction="at_most", level=level))
    return draw(st.permutations(found))


@st.composite
def stored(draw, make):
    policy = policy_of(make, accuracy=draw(LIMITS), latency=draw(LIMITS))
    items = draw(reported(make, policy))
    waivers = [make.waiver(check) for check, _ in CHECKS if draw(RARELY)]
    return policy, items, run_of(make, policy, items, waivers=waivers)


@EXAMPLES
@given(data=st.data())
def test_its_own_policy_changes_nothing(maker, data):
    policy, items, run = data.draw(stored(maker))
    again = rescore(run, policy, policy.model_validate(policy.to_json()), items)
    assert again.record == run
    assert again.notes == ()


@EXAMPLES
@given(data=st.data(), limits=st.lists(LIMITS, min_size=2, max_size=2).map(sorted))
def test_a_stricter_gate_never_raises_the_low_score(maker, data, limits):
    old, items, run = data.draw(stored(maker))
    mild, strict = limits
    other = old.thresholds["gates.latency.at_most"]
    lows = [
        rescore(run, old, policy_of(maker, accuracy=limit, latency=other), items).record.score.low
        for limit in (mild, strict)
    ]
    assert lows[0] >= lows[1]
    other = old.thresholds["gates.accuracy.at_least"]
    lows = [
        rescore(run, old, policy_of(maker, accuracy=other, latency=limit), items).record.score.low
        for limit in (strict, mild)
    ]
    assert lows[0] >= lows[1]


@EXAMPLES
@given(data=st.data(), accuracy=LIMITS, latency=LIMITS)
def test_less_evidence_never_raises_the_low_score(maker, data, accuracy, latency):
    """Whatever the new limits; of a run that missed limits, what it missed is not taken away: it
    is what tells a failure that a milder limit lifts from one that it does not."""
    old, items, run = data.draw(stored(maker))
    new = policy_of(maker, accuracy=accuracy, latency=latency)
    is_stricter = accuracy >= old.thresholds["gates.accuracy.at_least"]
    is_stricter = is_stricter and latency <= old.thresholds["gates.latency.at_most"]

    def without(item):
        kept = [
            e
            for e in item.evidence
            if (missed_limit(e) and not is_stricter) or not data.draw(st.booleans())
        ]
        return item.model_copy(update={"evidence": kept})

    # Of one item: what another loses would hide what this one gains.
    chosen = data.draw(st.sampled_from(items[2:4])).nodeid
    poorer = {
        item.nodeid: without(item) if item.nodeid == chosen else item for item in items_of(run)
    }
    told = [
        item.model_copy(update={"evidence": poorer[item.nodeid].evidence})
        for item in items
        if item.nodeid in poorer
    ]
    less = run_of(maker, old, list(poorer.values()), waivers=run.waivers)
    low = rescore(less, old, new, told).record.score.low
    assert low <= rescore(run, old, new, items).record.score.low
