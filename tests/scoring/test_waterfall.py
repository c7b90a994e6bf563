"""The waterfall adds up; repairs are offered in the order that pays."""

from decimal import Decimal
from fractions import Fraction

import pytest

from forge_harness.scoring import Scope, assemble, waterfall, way_back

CHECKS = (
    ("a.x", "critical"),
    ("a.y", "high"),
    ("a.z", "low"),
    ("b.x", "medium"),
    ("b.y", "medium"),
    ("b.z", "medium"),
)


def run(make, **outcomes):
    policy = make.policy(*CHECKS, weights={"a": 7, "b": 3})
    items = [
        make.item(name, outcomes.get(name.replace(".", "_"), "pass"))
        for name, _ in CHECKS
        if outcomes.get(name.replace(".", "_")) != "missing"
    ]
    return assemble(policy, items, scope=Scope(), context=make.context()), policy


CASES = [
    {},
    {"a_z": "fail"},
    {"b_x": "warn", "b_y": "missing"},
    {"a_x": "fail"},
    {"a_x": "fail", "a_y": "fail", "a_z": "fail", "b_x": "missing"},
    {"a_y": "error", "b_x": "fail", "b_y": "fail"},
    {name.replace(".", "_"): "missing" for name, _ in CHECKS},
]


@pytest.mark.parametrize("outcomes", CASES)
def test_points_add_up_exactly(make, outcomes):
    record, policy = run(make, **outcomes)
    steps = waterfall(record, policy)
    assert sum((s.points for s in steps), Fraction(0)) == 100 - record.score.low
    assert sum((s.shown for s in steps), Decimal(0)) == 100 - record.score.low
    assert all(step.points >= 0 for step in steps)
    if steps:
        assert steps[-1].remaining == record.score.low


def test_a_full_pass_has_no_steps(make):
    record, policy = run(make)
    assert waterfall(record, policy) == []
    assert way_back(record, policy) == []


def test_caps_are_steps_of_their_own(make):
    record, policy = run(make, a_z="fail", a_y="fail", a_x="fail")
    steps = [(s.kind, s.id, s.points) for s in waterfall(record, policy)]
    assert steps[:3] == [
        ("check", "a.x", Fraction(560, 13)),
        ("check", "a.y", Fraction(280, 13)),
        ("check", "a.z", Fraction(70, 13)),
    ]
    # 30 points are left, under every cap: they cost nothing but are named.
    assert [(kind, points) for kind, _, points in steps[3:]] == [("cap", 0)] * 3


def test_a_binding_cap_costs_points(make):
    checks = [(f"a.c{i}", "critical") for i in range(20)]
    policy = make.policy(*checks)
    items = [make.item(name, "pass" if i > 1 else "fail") for i, (name, _) in enumerate(checks)]
    items[1] = make.item("a.c1", "not_measured")
    record = assemble(policy, items, scope=Scope(), context=make.context())
    steps = [(s.kind, s.points, s.remaining) for s in waterfall(record, policy)]
    assert steps == [
        ("check", 5, 95),
        ("check", 5, 90),
        ("cap", 11, 79),
        ("cap", 30, 49),
    ]


def test_flooring_is_the_last_step(make):
    record, policy = run(make, a_z="fail")
    steps = waterfall(record, policy)
    assert [(s.kind, s.points) for s in steps] == [
        ("check", Fraction(70, 13)),
        ("floor", Fraction(8, 13)),
    ]


def test_nothing_applicable_is_explained(make):
    policy = make.policy(("a.x", "low"), a__x="capability:Packs")
    record = assemble(policy, [], scope=Scope(), context=make.context())
    (step,) = waterfall(record, policy)
    assert (step.points, step.reason) == (100, "no check in scope applies")


def test_the_way_back_lifts_binding_caps_first(make):
    checks = [("a.big", "medium"), ("a.top", "high"), *((f"a.o{i}", "high") for i in range(40))]
    policy = make.policy(*checks)
    bad = {"a.big", "a.top"}
    items = [make.item(name, "fail" if name in bad else "pass") for name, _ in checks]
    # The medium check is the more expensive one, but the high one holds the cap.
    policy = policy.model_copy(update={"severity_weights": policy.severity_weights | {"medium": 5}})
    record = assemble(policy, items, scope=Scope(), context=make.context())
    repairs = way_back(record, policy)
    assert [(r.check, r.low_after) for r in repairs] == [("a.top", 97), ("a.big", 100)]
    assert way_back(record, policy, target=95)[-1].check == "a.top"


def test_the_way_back_takes_the_largest_loss_first(make):
    record, policy = run(make, a_z="fail", b_x="missing", b_y="warn")
    assert [r.check for r in way_back(record, policy)] == ["b.x", "a.z", "b.y"]
    assert way_back(record, policy)[-1].low_after == 100
