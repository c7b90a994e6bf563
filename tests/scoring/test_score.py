"""forge-score/1 by hand-computed examples, against an oracle, and its invariants."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness.scoring import Scope, assemble, items_of, reassemble, score_of, settle
from forge_harness.scoring.rollup import CREDITS
from forge_harness.types import Outcome, Profile, Severity

PASSES = ("PASS", "PASS_WITH_WARNINGS")


def run(make, policy, items, **options):
    options.setdefault("scope", Scope())
    options.setdefault("context", make.context())
    return assemble(policy, items, **options)


# --- by hand ---------------------------------------------------------------------------------


def test_weights_of_severity_and_suite(make):
    policy = make.policy(
        ("a.x", "critical"), ("a.y", "low"), ("b.z", "medium"), weights={"a": 3, "b": 1}
    )
    record = run(make, policy, [make.item("a.x"), make.item("a.y", "fail"), make.item("b.z")])
    # 3/4 * 100 * 8/9 + 1/4 * 100 = 91.67, floored.
    assert (record.score.low, record.score.high) == (91, 91)
    assert [(s.name, s.low) for s in record.suites] == [("a", 88), ("b", 100)]


def test_what_is_not_measured_opens_the_interval(make):
    policy = make.policy(("a.x", "high"), ("a.y", "high"), ("b.z", "medium"))
    record = run(make, policy, [make.item("a.x"), make.item("b.z")])
    assert (record.score.low, record.score.high) == (75, 100)
    assert record.coverage == 0.75
    assert record.verdict == "INCOMPLETE"


def test_a_suite_without_results_is_not_dropped(make):
    record = run(make, make.policy(("a.x", "medium"), ("b.z", "low")), [make.item("a.x")])
    # Suite b is at 0, which caps both ends at 79.
    assert (record.score.low, record.score.high) == (50, 79)


def test_a_suite_without_applicable_checks_has_no_weight(make):
    policy = make.policy(("a.x", "high"), ("b.z", "high"), b__z="capability:Packs")
    record = run(make, policy, [make.item("a.x")])
    assert (record.score.low, record.score.high, record.coverage) == (100, 100, 1.0)
    assert record.suites[1].counts == {"not_applicable": 1}
    assert record.verdict == "PASS"


def test_a_declared_value_rules_out(make):
    policy = make.policy(("a.x", "high"), ("a.y", "high"), a__y="declared:accelerator=none")
    measured = [make.item("a.x")]
    outcomes = [
        run(make, policy, measured, context=make.context(declared=declared)).checks[1].outcome
        for declared in ({"accelerator": "none"}, {"accelerator": "cuda"}, {})
    ]
    assert outcomes == ["not_applicable", "not_measured", "not_measured"]


@pytest.mark.parametrize(
    ("severity", "outcome", "ceiling"),
    [
        ("critical", "fail", 49),
        ("critical", "error", 49),
        ("critical", "not_measured", 79),
        ("high", "fail", 79),
        ("high", "error", 79),
        ("high", "not_measured", None),
        ("medium", "fail", None),
    ],
)
def test_caps(make, severity, outcome, ceiling):
    # 40 other critical checks keep the uncapped score above 95.
    others = [(f"a.o{i}", "critical") for i in range(40)]
    policy = make.policy(("a.x", severity), *others)
    items = [make.item("a.x", outcome), *(make.item(name) for name, _ in others)]
    score = run(make, policy, items).score
    if ceiling is None:
        assert score.low > 90
    else:
        assert (score.low, score.high) == (ceiling, ceiling)


def test_a_suite_at_49_caps_and_one_at_50_does_not(make):
    policy = make.policy(("a.x", "medium"), ("b.z", "low"), weights={"a": 99, "b": 1})
    half = [make.item("b.z", number=i) for i in range(50)]
    half += [make.item("b.z", "fail", number=i) for i in range(50, 100)]
    at_50 = run(make, policy, [make.item("a.x"), *half])
    at_49 = run(make, policy, [make.item("a.x"), *half, make.item("b.z", "fail", number=100)])
    assert (at_50.score.low, at_49.score.low) == (99, 79)
    assert (at_50.verdict, at_49.verdict) == ("PASS_WITH_WARNINGS", "FAIL")


def test_a_weak_suite_names_the_checks_that_lose_points_in_it(make):
    policy = make.policy(
        ("a.good", "low"), ("a.bad", "high"), ("a.none", "low"), ("a.n_a", "low"), ("b.bad", "low"),
        a__n_a="capability:Packs",
    )  # fmt: skip
    items = [make.item("a.good"), make.item("a.bad", "fail"), make.item("b.bad", "fail")]
    caps = {cap.reason: cap.checks for cap in score_of(run(make, policy, items), policy).caps}
    assert caps["suite a is under 50"] == ("a.bad", "a.none")
    assert caps["suite b is under 50"] == ("b.bad",)


def test_scores_and_shares_are_floored(make):
    checks = [(f"a.c{i}", "low") for i in range(1000)]
    policy = make.policy(*checks)
    items = [make.item(name) for name, _ in checks]
    almost = run(make, policy, [*items[:-1], make.item("a.c999", "fail")])
    assert (almost.score.low, almost.score.high) == (99, 99)  # 99.9
    assert run(make, policy, items[:-1]).coverage == 0.999
    thirds = [make.item("a.c0", "fail" if i else "pass", number=i) for i in range(3)]
    assert run(make, make.policy(("a.c0", "low")), thirds).checks[0].credit_low == "1/3"


# --- the oracle: written from the rule's text, sharing nothing with the code ------------------

ORACLE_CREDIT = {
    "pass": (1.0, 1.0),
    "warn": (0.5, 0.5),
    "flaky": (0.5, 0.5),
    "fail": (0.0, 0.0),
    "error": (0.0, 0.0),
    "not_measured": (0.0, 1.0),
}
ORACLE_ORDER = ["pass", "warn", "flaky", "not_measured", "error", "fail"]
ORACLE_WEIGHT = {"critical": 8, "high": 4, "medium": 2, "low": 1}


def oracle(weights, checks, outcomes):
    """(low, high, coverage) of {check: [(outcome, has evidence)]}, in 10**-9 fixed point."""
    suites = {}
    caps = [100]
    for name, severity in checks:
        items = outcomes.get(name) or [("not_measured", False)]
        low = [ORACLE_CREDIT[o][0] for o, _ in items]
        high = [ORACLE_CREDIT[o][1] for o, _ in items]
        shown = max((o for o, _ in items), key=ORACLE_ORDER.index)
        if severity in ("critical", "high"):
            credit = (min(low), min(high))
        else:
            credit = (sum(low) / len(low), sum(high) / len(high))
        measured = shown != "not_measured" and any(e for _, e in items)
        suites.setdefault(name.split(".")[0], []).append((severity, credit, measured))
        if shown in ("fail", "error") and severity in ("critical", "high"):
            caps.append(49 if severity == "critical" else 79)
        if shown == "not_measured" and severity == "critical":
            caps.append(79)
    total = sum(weights[s] for s in suites)
    ends = [0.0, 0.0, 0.0]
    for suite, rows in suites.items():
        within = sum(ORACLE_WEIGHT[severity] for severity, _, _ in rows)
        for severity, (low, high), measured in rows:
            share = weights[suite] / total * ORACLE_WEIGHT[severity] / within
            ends[0] += 100 * share * low
            ends[1] += 100 * share * high
            ends[2] += share * measured
        suite_low = sum(ORACLE_WEIGHT[s] * c[0] for s, c, _ in rows) / within
        if suite_low < 0.5 - 1e-9:
            caps.append(79)
    return tuple(int(min(end, min(caps)) + 1e-9) for end in ends[:2]), ends[2]


SEVERITIES = st.sampled_from([s.value for s in Severity])


@st.composite
def runs(draw):
    """(policy, weights, checks, {check: [(outcome, evidence count)]}) of 1 to 12 checks."""
    checks = [
        (f"{draw(st.sampled_from('abc'))}.c{i}", draw(SEVERITIES))
        for i in range(draw(st.integers(1, 12)))
    ]
    weights = {name: draw(st.integers(1, 20)) for name in "abc"}
    outcomes = {}
    for name, severity in checks:
        allowed = ["pass", "pass", "flaky", "fail", "error", "not_measured"]
        allowed += [] if severity in ("critical", "high") else ["warn"]
        outcomes[name] = [
            (outcome, draw(st.integers(0 if outcome in ("fail", "error") else 1, 2)))
            for outcome in draw(st.lists(st.sampled_from(allowed), max_size=4))
        ]
    return weights, checks, outcomes


def build(make, drawn):
    weights, checks, outcomes = drawn
    policy = make.policy(*checks, weights=weights)
    items = [
        make.item(name, outcome, number=number, evidence=evidence)
        for name, rows in outcomes.items()
        for number, (outcome, evidence) in enumerate(rows)
    ]
    return policy, items


@settings(max_examples=150)
@given(drawn=runs())
def test_against_the_oracle(maker, drawn):
    policy, items = build(maker, drawn)
    record = run(maker, policy, items)
    weights, checks, outcomes = drawn
    with_flags = {name: [(o, n > 0) for o, n in rows] for name, rows in outcomes.items()}
    ends, coverage = oracle(weights, checks, with_flags)
    assert (record.score.low, record.score.high) == ends
    assert record.coverage == pytest.approx(coverage, abs=1.1e-4)
    assert record.coverage <= coverage + 1e-9


@settings(max_examples=100)
@given(drawn=runs(), data=st.data())
def test_removing_evidence_never_raises_the_low_score(maker, drawn, data):
    policy, items = build(maker, drawn)
    waivers = [
        maker.waiver(name, data.draw(st.sampled_from(["2026-01-01", "2026-12-31"])))
        for name, _ in drawn[1]
        if data.draw(st.booleans())
    ]
    before = run(maker, policy, items, waivers=waivers)
    poorer = [
        item.model_copy(update={"evidence": []}) if data.draw(st.booleans()) else item
        for item in items
    ]
    after = run(maker, policy, poorer, waivers=waivers)
    assert after.score.low <= before.score.low
    assert after.coverage <= before.coverage
    assert after.verdict not in PASSES or before.verdict in PASSES


@settings(max_examples=100)
@given(drawn=runs(), data=st.data())
def test_dropping_a_check_earns_nothing(maker, drawn, data):
    """A deleted test loses its points; what it failed lifts a cap, never the verdict."""
    policy, items = build(maker, drawn)
    gone = data.draw(st.sampled_from([name for name, _ in drawn[1]]))
    before = run(maker, policy, items)
    after = run(maker, policy, [item for item in items if item.check != gone])
    exact = (score_of(after, policy).uncapped_low, score_of(before, policy).uncapped_low)
    assert exact[0] <= exact[1]
    assert after.verdict not in PASSES or before.verdict in PASSES or before.verdict == "FAIL"
    severity = dict(drawn[1])[gone]
    if severity in ("critical", "high"):
        assert after.verdict not in PASSES


WORSE = {
    "pass": ["warn", "flaky", "fail", "error"],
    "warn": ["fail", "error"],
    "flaky": ["fail", "error"],
    "not_measured": ["fail", "error"],
    "error": ["fail"],
    "fail": ["error"],
}


@settings(max_examples=150)
@given(drawn=runs(), data=st.data())
def test_a_worse_outcome_never_raises_either_end(maker, drawn, data):
    policy, items = build(maker, drawn)
    if not items:
        return
    waivers = [
        maker.waiver(name, data.draw(st.sampled_from(["2026-01-01", "2026-12-31"])))
        for name, _ in drawn[1]
        if data.draw(st.booleans())
    ]
    index = data.draw(st.integers(0, len(items) - 1))
    victim = settle(items[index], policy.by_id[items[index].check].severity)
    worse = data.draw(st.sampled_from(WORSE[victim.outcome]))
    changed = list(items)
    changed[index] = victim.model_copy(update={"outcome": Outcome(worse)})
    before = run(maker, policy, items, waivers=waivers)
    after = run(maker, policy, changed, waivers=waivers)
    assert after.score.low <= before.score.low
    assert after.score.high <= before.score.high


@settings(max_examples=60)
@given(drawn=runs(), data=st.data())
def test_order_sharding_and_merging_change_nothing(maker, drawn, data):
    policy, items = build(maker, drawn)
    whole = run(maker, policy, items)
    shuffled = data.draw(st.permutations(items))
    assert run(maker, policy, shuffled) == whole
    cut = data.draw(st.integers(0, len(items)))
    overlap = data.draw(st.integers(0, len(items)))
    shards = [
        items_of(run(maker, policy, part)) for part in (items[:cut], items[min(cut, overlap) :])
    ]
    assert run(maker, policy, list(itertools.chain(*shards))) == whole


@settings(max_examples=60)
@given(drawn=runs())
def test_bounds_and_digest(maker, drawn):
    policy, items = build(maker, drawn)
    record = run(maker, policy, items)
    assert 0 <= record.score.low <= record.score.high <= 100
    assert record.policy_digest == policy.digest
    assert all(0 <= suite.low <= suite.high <= 100 for suite in record.suites)
    assert [check.id for check in record.checks] == [entry.id for entry in policy.catalogue]


def test_a_record_reassembles_to_itself(make):
    policy = make.policy(("a.x", "high"), ("a.y", "low"), ("b.z", "low"))
    items = [make.item("a.x", "fail"), make.item("a.y", evidence=0), make.item("c.q")]
    record = run(make, policy, items, waivers=[make.waiver("a.x")])
    assert record.checks[0].outcome is Outcome.XFAIL
    assert reassemble(record, policy) == record
    assert reassemble(record, policy, waivers=[]).checks[0].outcome is Outcome.FAIL


def test_every_outcome_has_credits():
    assert set(CREDITS) == set(Outcome)
    assert all(0 <= low <= high <= 1 for low, high in CREDITS.values())
    assert CREDITS[Outcome.WARN] == (Fraction(1, 2), Fraction(1, 2))


def test_scope_is_that_of_the_profile(make):
    policy = make.policy(("a.x", "low"), ("a.y", "low"))
    nightly = policy.catalogue[1].model_copy(update={"profiles": (Profile.NIGHTLY,)})
    policy = policy.model_copy(update={"catalogue": (policy.catalogue[0], nightly)})
    record = run(make, policy, [make.item("a.x")])
    assert (record.scope.in_scope, record.scope.total) == (1, 2)
    assert record.verdict == "PASS"
