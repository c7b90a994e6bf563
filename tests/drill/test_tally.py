"""Counts of a campaign, and what they say about it."""

import json

import pytest

from forge_harness.drill.tally import Enough, Finding, Result, Status, Tally, not_measured


def test_what_went_wrong_first_is_the_reason():
    tally = Tally("kill", 3)
    tally.add(Finding(result=Result.OLD, acknowledged=2, recovery_s=0.5), where="a")
    tally.add(Finding(result=Result.LOST, message="round 1 is gone", acknowledged=1), where="b")
    tally.add(Finding(result=Result.NEW, recovery_s=0.1, orphans=4), where="c")
    report = tally.report()
    assert report.status is Status.LOST
    assert report.reason == "b: lost: round 1 is gone"
    assert (report.trials, report.acknowledged, report.lost) == (3, 3, 1)
    assert (report.in_doubt, report.orphans) == (1, 4)
    assert (report.recovery_p50_s, report.recovery_max_s) == (0.1, 0.5)
    assert json.loads(json.dumps(report.to_json()))["findings"] == [report.reason]


@pytest.mark.parametrize("result", [Result.LOST, Result.TORN, Result.SILENT, Result.UNRECOVERABLE])
def test_each_bad_result_breaks_the_promise(result):
    tally = Tally("x", 0)
    tally.add(Finding(result=result), where="here")
    assert tally.report().status is Status.LOST
    assert tally.report().bad == 1


@pytest.mark.parametrize(
    "result", [Result.OLD, Result.NEW, Result.DETECTED, Result.HARMLESS, Result.REFUSED]
)
def test_the_others_do_not(result):
    tally = Tally("x", 0)
    tally.add(Finding(result=result), where="here")
    assert tally.report().status is Status.HELD


def test_a_campaign_that_tried_nothing_measured_nothing():
    assert Tally("x", 0).report().status is Status.NOT_MEASURED


def test_a_fault_that_never_struck_proves_nothing():
    tally = Tally("x", 0)
    tally.add(Finding(result=Result.OLD), where="a")
    tally.miss("b")
    report = tally.report()
    assert report.status is Status.NOT_MEASURED
    assert report.reason == "1 fault never struck, first: b"
    assert report.trials == 1


def test_it_can_stop_at_the_first_loss():
    tally = Tally("x", 0, stop_early=True)
    tally.add(Finding(result=Result.OLD), where="a")
    with pytest.raises(Enough):
        tally.add(Finding(result=Result.TORN), where="b")
    assert tally.report().torn == 1


def test_a_campaign_that_cannot_run_says_why():
    report = not_measured("kill", 1, "no strace")
    assert (report.status, report.reason, report.trials) == (Status.NOT_MEASURED, "no strace", 0)
