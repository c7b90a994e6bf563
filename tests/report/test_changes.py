"""What changed against a baseline: each check on one side, each value beyond its noise or not."""

from __future__ import annotations

import itertools

import pytest

from forge_harness.report import build_report, render_markdown
from forge_harness.report.changes import SIDES, side_of
from forge_harness.types import Outcome

from . import support


@pytest.fixture(scope="module")
def changes(report_of):
    return report_of("compared").changes


def names(changes, side):
    return {change.check for change in getattr(changes, side)}


def test_each_check_that_changed_is_on_one_side(changes):
    assert names(changes, "newly_failing") == {
        "architecture.weight_scale",
        "security.tls_1_3_only",
        "data.balance",
    }
    assert names(changes, "fixed") == {"data.leak_canary"}
    assert names(changes, "newly_not_measured") == {"performance.load_10x"}
    assert names(changes, "newly_measured") == {"data.loader_order"}
    assert names(changes, "otherwise_changed") == {"state.io_errors"}


@pytest.mark.parametrize(("before", "after"), [*itertools.permutations(Outcome, 2)])
def test_no_change_is_lost_or_called_good_that_is_not(before, after):
    bad = {"fail", "error", "xpass"}
    side = side_of(before, after)
    assert side in SIDES
    assert (side == "newly_failing") == (after in bad and before not in bad)
    if side == "fixed":
        assert (before in bad, after in {"pass", "warn", "flaky"}) == (True, True)
    assert (side == "newly_not_measured") == (after == "not_measured")
    if side == "newly_measured":
        assert before == "not_measured"
        assert after not in bad


def test_values_are_beyond_their_noise_or_within_it(changes):
    """By hand: 2 % of the baseline's value, 2 points of score; times are not judged."""
    moves = {row.name: (row.before, row.after, row.difference, row.move) for row in changes.values}
    assert moves["accuracy"] == ("0.9", "0.97", "+0.07", "better")
    assert moves["resource_use"] == ("4", "4.05", "+0.05", "within")
    assert moves["compression_ratio"] == ("10", "9", "-1", "worse")
    assert moves["latency"] == ("0.05", "0.07", "+0.02", "not_judged")
    assert moves["score"] == ("79", "49", "-30", "worse")  # a high check failed; a critical one
    rows = {row.name: row for row in changes.values}
    assert rows["compression_ratio"].allowed == "at least 9.8"
    assert rows["resource_use"].allowed == "at most 4.08"
    assert rows["compression_ratio"].reason in changes.regressions
    assert "is a time" in rows["latency"].reason
    assert rows["latency"].allowed == ""


@pytest.mark.parametrize(
    ("gate", "value", "move"),
    [
        ("accuracy", 0.919, "better"),
        ("accuracy", 0.917, "within"),
        ("accuracy", 0.883, "within"),
        ("accuracy", 0.881, "worse"),
        ("resource_use", 3.91, "better"),
        ("resource_use", 3.93, "within"),
        ("resource_use", 4.09, "worse"),
    ],
)
def test_better_is_as_far_as_worse(gate, value, move):
    before = support.kept_record(1, values=support.BEFORE)
    now = support.kept_record(2, values={**support.BEFORE, gate: value})
    changes = build_report(now, support.POLICY, before).changes
    moved = {row.name: row.move for row in changes.values if row.move != "not_judged"}
    assert moved.pop(gate) == move
    assert set(moved.values()) == {"within"}


def test_the_baseline_says_who_accepted_it(changes):
    run = changes.run
    assert (run.run_id, run.verdict, run.low, run.high) == ("run-20", "FAIL", 79, 79)
    assert run.acceptance == "accepted on 2026-01-20, until 2026-02-01 by ada: new recipe"
    assert len(run.outcomes) == 148


def test_runs_that_do_not_compare_say_all_that_differs(run_record):
    before = support.kept_record(
        20, policy=support.STRICTER, cpu="EPYC", declared={"accelerator": "a GPU"}
    )
    changes = build_report(
        run_record("compared"), support.POLICY, support.baseline_of(before, support.STRICTER)
    ).changes
    assert changes.refusal.startswith("the machine class is")
    assert [text.partition(" ")[0] for text in changes.breaks] == ["machine", "policy", "declared"]
    assert changes.values == changes.regressions == ()
    assert names(changes, "newly_failing")  # outcomes are compared all the same


def test_checks_of_one_run_only_are_named():
    record = support.kept_record(2)
    base = support.baseline_of(support.kept_record(1))
    checks = dict(base.checks)
    old = checks.pop("data.balance")
    checks["data.gone"] = old
    first = checks["data.leak_canary"]
    checks["data.leak_canary"] = first.model_copy(update={"version": 7, "outcome": "fail"})
    changed = base.model_copy(update={"checks": checks})
    found = build_report(record, support.POLICY, changed).changes
    assert [(row.check, row.why) for row in found.uncompared] == [
        ("data.balance", "not in the baseline, pass now"),
        (
            "data.leak_canary",
            "another meaning: version 7 in the baseline, fail; version 1, pass now",
        ),
        ("data.gone", "not in this run, pass in the baseline"),
    ]
    text = render_markdown(build_report(record, support.POLICY, changed))
    assert "- Not compared: <code>data.balance</code> not in the baseline, pass now; <code>" in text
    assert names(found, "fixed") == set()


def test_a_run_does_not_change_against_itself(run_record):
    record = run_record("compared")
    changes = build_report(record, support.POLICY, record).changes
    assert all(not getattr(changes, side) for side in SIDES)
    assert {row.move for row in changes.values} <= {"within", "not_judged"}
    assert (changes.refusal, changes.breaks, changes.uncompared) == ("", (), ())
