"""The share of the security suite that passes, from the checks of the run alone."""

from __future__ import annotations

import pytest

from forge_harness.policy import CatalogueEntry, Policy
from forge_harness.record import EvidenceRecord, ItemRecord, SubjectRecord
from forge_harness.scoring import RunContext, Scope, assemble
from forge_harness.scoring.assembly import reassemble
from forge_harness.scoring.derived import PREFIX
from forge_harness.types import Outcome, Profile, Severity

COMPLIANCE = "gates.security_compliance"
WEIGHTS = {Severity.CRITICAL: 8, Severity.HIGH: 4, Severity.MEDIUM: 2, Severity.LOW: 1}


def entry(name, severity="medium", **changes):
    defaults = {
        "id": name,
        "title": name,
        "suite": name.partition(".")[0],
        "severity": severity,
        "component": "QualityCoordinator",
        "measures_suite": "security" if name == COMPLIANCE else None,
    }
    return CatalogueEntry(**{**defaults, **changes})


def policy(limit=0.75, entries=None):
    chosen = entries or [
        entry(COMPLIANCE, "high"),
        entry("security.a", "critical"),
        entry("security.b", "high"),
        entry("security.c", "high"),
        entry("security.late", "critical", profiles=[Profile.NIGHTLY]),
        entry("data.d", "critical"),
    ]
    return Policy(
        rule="forge-score/1",
        suite_weights={"gates": 1, "security": 1, "data": 1},
        severity_weights=WEIGHTS,
        thresholds={f"{COMPLIANCE}.at_least": limit} if limit is not None else {},
        units={COMPLIANCE: "1"},
        catalogue=chosen,
    )


def item(check, outcome="pass"):
    nodeid = f"test_{check}.py::test"
    evidence = EvidenceRecord(
        item=nodeid,
        name="x",
        value=1,
        unit="1",
        limit=None,
        direction="record",
        reason="",
        samples=None,
    )
    return ItemRecord(
        nodeid=nodeid, check=check, outcome=outcome, reason="", duration_s=0.0, evidence=[evidence]
    )


def record(outcomes, *, using=None, scope=None, more=()):
    context = RunContext(
        run_id="r",
        subject=SubjectRecord(spec="", name="", capabilities=[]),
        environment={},
        declared={},
        seed=0,
        command=[],
        started_at="2026-01-01T00:00:00Z",
    )
    items = [item(f"security.{name}", outcome) for name, outcome in outcomes.items()]
    items += more
    return assemble(using or policy(), items, scope=scope or Scope(), context=context)


def compliance(found):
    return next(check for check in found.checks if check.id == COMPLIANCE)


def values(check):
    return {e.name: e.value for e in check.evidence}


@pytest.mark.parametrize(
    ("outcomes", "outcome", "value"),
    [
        ({"a": "pass", "b": "pass", "c": "pass"}, "pass", 1.0),
        ({"a": "pass", "b": "pass", "c": "fail"}, "pass", 0.75),
        ({"a": "fail", "b": "pass", "c": "pass"}, "fail", 0.5),
        ({"a": "pass", "b": "pass"}, "pass", 0.75),
        ({"a": "fail", "b": "pass"}, "fail", 0.5),
    ],
)
def test_the_share_is_decided_by_weight(outcomes, outcome, value):
    check = compliance(record(outcomes))
    assert check.outcome == outcome
    assert values(check)["security_compliance"] == value


def test_what_is_not_measured_is_neither_passed_nor_failed():
    check = compliance(record({"b": "pass", "c": "pass"}))
    assert check.outcome is Outcome.NOT_MEASURED
    assert check.reason == "from 0.5 to 1.0, limit 0.75; unmeasured: security.a"
    assert values(check) == {"security_compliance_low": 0.5, "security_compliance_high": 1.0}


def test_a_share_is_never_rounded_over_its_limit():
    entries = [entry(COMPLIANCE), *(entry(f"security.c{n}", "low") for n in range(3))]
    chosen = policy(limit=2 / 3 + 1e-9, entries=entries)
    found = record({"c0": "pass", "c1": "pass", "c2": "fail"}, using=chosen)
    assert compliance(found).outcome is Outcome.FAIL


def test_a_selection_without_the_whole_suite_is_not_measured():
    scope = Scope(checks=(COMPLIANCE, "security.a", "security.b"))
    check = compliance(record({"a": "pass", "b": "pass"}, scope=scope))
    assert check.outcome is Outcome.NOT_MEASURED
    assert "without security.c" in check.reason


def test_checks_of_another_profile_are_not_asked_for():
    found = record({"a": "pass", "b": "pass", "c": "pass"})
    assert compliance(found).outcome is Outcome.PASS
    nightly = record({"a": "pass", "b": "pass"}, scope=Scope(profile=Profile.NIGHTLY))
    assert compliance(nightly).outcome is Outcome.NOT_MEASURED


def test_without_a_threshold_it_is_not_measured():
    check = compliance(record({"a": "pass"}, using=policy(limit=None)))
    assert check.outcome is Outcome.NOT_MEASURED
    assert "the policy has no gates.security_compliance.at_least" in check.reason


def test_without_the_check_nothing_is_derived():
    found = record({"a": "pass"}, using=policy(entries=[entry("security.a")]))
    assert [check.id for check in found.checks] == ["security.a"]


def test_a_stored_share_is_not_trusted():
    chosen = policy()
    found = record({"a": "fail", "b": "pass", "c": "pass"}, using=chosen)
    check = compliance(found)
    better = check.evidence[0].model_copy(update={"value": 1.0})
    passed = check.items[0].model_copy(update={"outcome": Outcome.PASS, "reason": ""})
    forged = check.model_copy(update={"evidence": [better], "items": [passed]})
    checks = [forged if each is check else each for each in found.checks]
    assert forged.items[0].nodeid.startswith(PREFIX)
    assert reassemble(found.model_copy(update={"checks": checks}), chosen) == found


def test_a_test_cannot_pass_for_it():
    # A test marked for the derived check is one more item, and the worst decides.
    found = record({"a": "fail", "b": "pass", "c": "pass"}, more=[item(COMPLIANCE)])
    assert compliance(found).outcome is Outcome.FAIL
    assert len(compliance(found).items) == 2


def test_the_digest_of_a_policy_without_it_is_as_it_was():
    entries = [entry("security.a")]
    stored = policy(entries=entries).to_json()
    assert "measures_suite" not in stored["catalogue"][0]
    assert Policy.model_validate(stored) == policy(entries=entries)


def test_an_unknown_suite_is_refused():
    with pytest.raises(ValueError, match="Unknown suite 'secrity'"):
        policy(entries=[entry("security.a", measures_suite="secrity")])


@pytest.mark.parametrize("passing", range(21))
@pytest.mark.parametrize("limit", [0.9, 0.8, 0.3, 0.35, 0.55])
def test_a_share_that_is_the_limit_passes(limit, passing):
    # 0.9 and 0.8 are under the floats nearest to them, 0.35 and 0.55 over theirs.
    names = [f"security.c{n:02}" for n in range(20)]
    using = policy(limit, [entry(COMPLIANCE, "high"), *map(entry, names)])
    outcomes = {f"c{n:02}": "pass" if n < passing else "fail" for n in range(20)}
    check = compliance(record(outcomes, using=using))
    reached = 100 * passing >= 20 * round(100 * limit)
    assert check.outcome == ("pass" if reached else "fail")
    judged = next(e for e in check.evidence if e.name == "security_compliance")
    assert (judged.value >= judged.limit) is reached


@pytest.mark.parametrize(("limit", "outcome"), [(0.66666, "pass"), (0.66667, "fail")])
def test_a_limit_of_five_digits_is_held_against_more_than_four(limit, outcome):
    names = ["security.a", "security.b", "security.c"]
    using = policy(limit, [entry(COMPLIANCE, "high"), *map(entry, names)])
    found = record({"a": "pass", "b": "pass", "c": "fail"}, using=using)
    assert compliance(found).outcome == outcome
    assert reassemble(found, using) == found
