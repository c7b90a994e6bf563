"""How a seeded defect is judged, and what the counts say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.drill.defect import Defect, Stage
from forge_harness.drill.kills import (
    DefectResult,
    Found,
    Status,
    SuitesReport,
    VariantResult,
    judged,
    power_of,
)
from forge_harness.types import Outcome

CHECK, OTHER = "architecture.weight_scale", "architecture.weight_rounding"
SEED = Defect(
    id="seed",
    title="Something is wrong",
    stage=Stage.QUANTIZER,
    check=CHECK,
    shows="scale_error",
    subject=object,
    alive=repr,
)
PASS = Found(Outcome.PASS, "")
SOUND = {CHECK: PASS, OTHER: PASS}
NAMED = Found(Outcome.FAIL, "scale_error is 3, over its limit of 1")


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({CHECK: NAMED}, Status.KILLED),
        ({CHECK: NAMED, OTHER: Found(Outcome.ERROR, "boom")}, Status.KILLED),
        ({CHECK: Found(Outcome.FAIL, "tie_errors is 4")}, Status.OTHER_REASON),
        ({CHECK: Found(Outcome.ERROR, "TypeError: scale_error")}, Status.CRASHED),
        ({CHECK: PASS}, Status.SURVIVED),
        ({CHECK: Found(Outcome.WARN, "scale_error is 1")}, Status.SURVIVED),
        ({CHECK: PASS, OTHER: Found(Outcome.FAIL, "scale_error")}, Status.ELSEWHERE),
        ({CHECK: PASS, OTHER: Found(Outcome.WARN, "scale_error")}, Status.SURVIVED),
        ({CHECK: Found(Outcome.NOT_MEASURED, "no GPU")}, Status.NOT_MEASURED),
        ({CHECK: Found(Outcome.NOT_APPLICABLE, "declared")}, Status.NOT_MEASURED),
        ({OTHER: NAMED}, Status.NOT_MEASURED),
        ({}, Status.NOT_MEASURED),
    ],
)
def test_only_the_named_check_for_the_named_reason_is_a_kill(found, status):
    assert judged(SEED, found, SOUND)[0] is status


@pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.PASS])
def test_a_check_that_is_not_green_for_the_reference_kills_nothing(outcome):
    status, reason = judged(SEED, {CHECK: NAMED}, {CHECK: Found(outcome, "slow machine")})
    assert status is Status.NOT_MEASURED
    assert "reference subject" in reason
    assert "slow machine" in reason


def test_nor_one_that_was_not_run_for_it():
    assert judged(SEED, {CHECK: NAMED}, {})[0] is Status.NOT_MEASURED


def test_red_for_the_reference_too_is_not_red_elsewhere():
    sound = {CHECK: PASS, OTHER: Found(Outcome.FAIL, "slow")}
    assert judged(SEED, {CHECK: PASS, OTHER: NAMED}, sound)[0] is Status.SURVIVED


def row(status, **changes):
    fields = {"id": "seed", "title": "", "stage": "quantizer", "source": "", "subtlety": 3}
    fields |= {
        "check": CHECK,
        "status": status,
        "reason": "",
        "outcomes": {},
        "command": "",
        "reference": "a",
    }
    return DefectResult(**{**fields, "seeded": "b", "seconds": 1.0, **changes})


def report(statuses=(), variants=()):
    return SuitesReport(
        defects=[row(status) for status in statuses],
        variants=variants,
        profile="quick",
        seed=0,
        policy_digest="sha256:0",
        environment={},
        started_at="",
        finished_at="",
        seconds=1.0,
    )


def variant(alarms=(), problem="", outcomes=None):
    return VariantResult(
        id="rows",
        title="",
        outcomes=outcomes or {CHECK: "pass"},
        alarms=dict.fromkeys(alarms, "red"),
        problem=problem,
        seconds=1.0,
    )


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.KILLED])
def test_nothing_but_kills_holds(status):
    found = report([Status.KILLED, status]).status
    assert found == ("not measured" if status is Status.NOT_MEASURED else "missed")


def test_kills_alone_hold():
    assert report([Status.KILLED], [variant()]).status == "held"


def test_no_defect_is_not_measured():
    assert report().status == "not measured"


def test_a_false_alarm_is_a_miss():
    assert report([Status.KILLED], [variant(alarms=[CHECK])]).status == "missed"


def test_a_sound_subject_that_could_not_be_run_is_not_measured():
    assert report([Status.KILLED], [variant(problem="died")]).status == "not measured"


def test_a_miss_weighs_more_than_what_was_not_measured():
    assert report([Status.SURVIVED, Status.NOT_MEASURED]).status == "missed"


def test_what_was_not_measured_is_in_no_share_of_false_alarms():
    outcomes = {CHECK: "pass", OTHER: "not_measured", "data.balance": "not_applicable"}
    assert report([], [variant(outcomes=outcomes)]).measured_on_variants == 1


@given(st.lists(st.sampled_from(list(Status))))
def test_the_power_is_over_what_could_be_killed(statuses):
    power = power_of("all", [row(status) for status in statuses])
    out = (Status.EQUIVALENT, Status.NOT_MEASURED)
    assert power.of == sum(status not in out for status in statuses)
    assert power.killed == statuses.count(Status.KILLED)
    share = power.killed / power.of if power.of else 0.5
    assert 0 <= power.low <= share <= power.high <= 1


@given(st.lists(st.sampled_from(list(Status)), min_size=1))
def test_groups_add_up_to_the_whole(statuses):
    found = report(statuses)
    whole = power_of("all", found.defects)
    for by in ("stage", "suite", "subtlety"):
        groups = found.power(by)
        assert sum(group.of for group in groups) == whole.of
        assert sum(group.killed for group in groups) == whole.killed


def test_a_single_miss_of_two_hundred():
    """Against tables of the exact interval: 199 of 200 is [97.25 %, 99.99 %]."""
    power = power_of("all", [row(Status.KILLED)] * 199 + [row(Status.SURVIVED)])
    assert (round(power.low, 4), round(power.high, 4)) == (0.9725, 0.9999)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"id": "not an id"}, "identifier"), ({"subtlety": 0}, "1 to 5"), ({"subtlety": 6}, "1 to 5")],
)
def test_a_defect_that_cannot_be_named_or_weighed_is_refused(changes, said):
    fields = {name: getattr(SEED, name) for name in ("title", "stage", "check", "shows")}
    fields |= {"id": "seed", "subject": object, "alive": repr}
    with pytest.raises(ValueError, match=said):
        Defect(**{**fields, **changes})
