"""CTRF: the official schema, counts, and nothing green that is not."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from jsonschema import Draft7Validator

from forge_harness.errors import ExitCode
from forge_harness.report import build_report, render_ctrf
from forge_harness.report.machine import epoch_ms
from forge_harness.scoring import Scope, exit_code_for
from forge_harness.types import Outcome, Profile

from . import hostile, support

SCHEMA = Path(__file__).parent / "schemas" / "ctrf.schema.json"
DIGEST = "483d18d861be83d721ad57ec0f36788610471e8068314b50bb73a7a655068191"
VALIDATOR = Draft7Validator(json.loads(SCHEMA.read_bytes()))
OURS = "forge.harness"
SEVERE = ["architecture.weight_scale", "gates.latency"]


def test_the_schema_is_the_published_one():
    assert hashlib.sha256(SCHEMA.read_bytes()).hexdigest() == DIGEST
    Draft7Validator.check_schema(VALIDATOR.schema)


def parsed(report):
    """The document, as a reader gets it: valid, and counted right."""
    text = render_ctrf(report)
    document = json.loads(text.encode("utf-8").decode("utf-8"), parse_constant=pytest.fail)
    VALIDATOR.validate(document)
    results = document["results"]
    summary, tests = results["summary"], results["tests"]
    assert summary["tests"] == len(tests)
    for status in ("passed", "failed", "skipped", "pending", "other"):
        assert summary[status] == sum(test["status"] == status for test in tests)
    assert summary["flaky"] == sum(test.get("flaky", False) for test in tests)
    assert summary["suites"] == len({tuple(test["suite"]) for test in tests})
    assert summary["stop"] >= summary["start"]
    return document


def ctrf(record):
    return parsed(build_report(record, support.POLICY))["results"]


def test_of(results, name):
    (test,) = [test for test in results["tests"] if test["name"] == name]
    return test


test_of.__test__ = False


def names(results):
    return [test["name"] for test in results["tests"]]


@pytest.mark.parametrize("kind", support.RECORDS)
def test_every_check_is_one_test_in_the_order_of_the_record(kind, run_record):
    record = run_record(kind)
    results = ctrf(record)
    assert names(results)[: len(record.checks)] == [check.id for check in record.checks]
    for test, check in zip(results["tests"], record.checks, strict=False):
        assert test["rawStatus"] == check.outcome
        assert test["suite"] == [check.suite]
        assert test["duration"] == round(check.duration_s * 1000)


@pytest.mark.parametrize(
    ("check", "outcome", "status"),
    [
        *itertools.product(SEVERE, ("pass", "flaky"), ("passed",)),
        *itertools.product(SEVERE, ("fail", "error"), ("failed",)),
        *itertools.product(SEVERE, ("not_measured",), ("other",)),
        *itertools.product(["data.balance"], ("pass", "flaky", "warn"), ("passed",)),
        *itertools.product(["data.balance"], ("fail", "error"), ("failed",)),
        ("data.balance", "not_measured", "other"),
    ],
)
def test_outcomes(check, outcome, status):
    found = test_of(ctrf(support.record(support.items_of_all({check: outcome}))), check)
    assert (found["status"], found["rawStatus"]) == (status, outcome)


def test_what_is_waived_or_not_applicable_is_skipped(run_record):
    results = ctrf(run_record("fail"))
    assert test_of(results, "state.io_errors")["status"] == "skipped"
    assert test_of(results, "state.io_errors")["rawStatus"] == "xfail"
    skipped = [test for test in results["tests"] if test["rawStatus"] == "not_applicable"]
    assert [test["status"] for test in skipped] == ["skipped"]


def test_a_waiver_that_is_not_needed_fails():
    found = test_of(ctrf(support.record(waivers=support.WAIVERS[:1])), "state.io_errors")
    assert (found["status"], found["rawStatus"]) == ("failed", "xpass")


def test_a_check_that_passed_at_its_third_attempt_is_flaky():
    items = support.items_of_all()
    index = [item.check for item in items].index("data.balance")
    items[index] = items[index].model_copy(update={"attempts": 3, "outcome": Outcome.FLAKY})
    results = ctrf(support.record(items))
    found = test_of(results, "data.balance")
    assert (found["status"], found["flaky"], found["retries"]) == ("passed", True, 2)
    assert results["summary"]["flaky"] == 1
    assert not any("retries" in test for test in results["tests"] if test is not found)


def test_a_failure_says_why_and_what_was_measured(run_record):
    found = test_of(ctrf(run_record("fail")), "architecture.weight_scale")
    assert found["message"] == "architecture.weight_scale ended fail"
    assert "assert 1 == 2" in found["trace"]
    assert found["filePath"] == "architecture/test_weight_scale.py"
    assert found["labels"] == {"severity": "critical", "component": "Phase4Connector"}
    ours = found["extra"][OURS]
    assert (ours["severity"], ours["component"], ours["version"]) == (
        "critical",
        "Phase4Connector",
        1,
    )
    assert ours["command"].startswith("forge-harness run --check architecture.weight_scale")
    assert ours["evidence"][0] == {
        "item": "architecture/test_weight_scale.py::test",
        "name": "weight_scale",
        "value": 0.5,
        "actual": "0.5",
        "expected": "at least 0.9",
        "unit": "1",
        "state": "fail",
        "reason": "a stated reason",
    }


def test_the_file_of_a_check_that_did_not_run_is_not_known():
    results = ctrf(support.record(support.items_of_all({"gates.latency": None})))
    assert "filePath" not in test_of(results, "gates.latency")


def test_times_and_place_of_the_run(run_record):
    document = parsed(build_report(run_record("pass"), support.POLICY))
    assert (document["reportFormat"], document["specVersion"]) == ("CTRF", "0.0.0")
    assert document["runId"] == "20260102T030405Z-0a1b2c3d"
    summary = document["results"]["summary"]
    begun = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert summary["start"] == int(begun.timestamp()) * 1000
    assert summary["duration"] == summary["stop"] - summary["start"] == 12 * 60 * 1000
    place = document["results"]["environment"]
    assert (place["appName"], place["osPlatform"]) == ("toy", "linux")
    assert place["extra"][OURS] == {"os": "Linux", "packages.torch": "2.13.0"}


def test_what_the_policy_changes_is_with_its_digest(report_of):
    extra = parsed(report_of("mild"))["results"]["summary"]["extra"][OURS]
    assert extra["policy_digest"] == support.MILD.digest
    assert extra["policy_changes"] == list(report_of("mild").headline.policy_changes)
    (alert,) = extra["alerts"]
    assert "gates.accuracy.at_least is 0.5, shipped 0.85" in alert


def test_the_commit_the_shard_and_the_version_of_the_tool():
    record = support.record(
        scope=Scope(profile=Profile.QUICK, checks=("data.balance",), shard="2/3"),
        items=[support.item("data.balance")],
        environment={
            "git_commit": "abc",
            "packages": {"bitnet-forge-harness": "1.2"},
            "kernel": "6",
        },
    )
    results = ctrf(record)
    assert results["tool"] == {"name": "forge-harness", "version": "1.2"}
    place = results["environment"]
    assert (place["commit"], place["shardId"], place["osRelease"]) == ("abc", "2/3", "6")


def test_a_run_that_was_killed_has_no_end(run_record):
    summary = ctrf(run_record("interrupted"))["summary"]
    assert summary["stop"] == summary["start"] > 0
    assert summary["extra"][OURS]["state"] == "interrupted"


def test_a_green_run_has_no_test_for_the_verdict(run_record):
    results = ctrf(run_record("pass"))
    assert results["summary"]["failed"] == 0
    assert "run.verdict" not in names(results)


def test_nothing_but_the_verdict_says_that_a_run_was_stopped():
    """Every check passed before the run was stopped."""
    results = ctrf(support.record(state="interrupted"))
    found = test_of(results, "run.verdict")
    assert (found["status"], found["rawStatus"]) == ("failed", "INCOMPLETE")
    assert found["message"].startswith("INCOMPLETE: the run is interrupted: stopped by Ctrl-C")


@pytest.mark.parametrize("check", SEVERE)
@pytest.mark.parametrize("outcome", [None, "not_measured"])
def test_a_severe_check_that_was_not_measured_is_not_green(check, outcome):
    results = ctrf(support.record(support.items_of_all({check: outcome})))
    assert test_of(results, check)["status"] == "other"
    assert test_of(results, "run.verdict")["status"] == "failed"
    assert check in test_of(results, "run.verdict")["message"]


def test_a_lesser_check_that_was_not_measured_leaves_a_run_green():
    record = support.record(support.items_of_all({"data.balance": None}))
    assert exit_code_for(record) is ExitCode.PASS
    assert ctrf(record)["summary"]["failed"] == 0


def selection(**outcomes):
    return support.record(
        [support.item(f"data.{name}", outcome) for name, outcome in outcomes.items()],
        scope=Scope(profile=Profile.FULL, checks=tuple(f"data.{name}" for name in outcomes)),
    )


@pytest.mark.parametrize(
    ("outcomes", "failed"),
    [
        ({"balance": "pass"}, 0),
        ({"balance": "flaky"}, 0),
        ({"balance": "not_measured"}, 1),
        ({"splits_disjoint": "not_measured", "balance": "pass"}, 1),
        ({"balance": "fail"}, 1),
    ],
)
def test_a_selection_is_green_when_all_of_it_was_measured(outcomes, failed):
    record = selection(**outcomes)
    assert record.verdict == "PARTIAL"
    assert ctrf(record)["summary"]["failed"] == failed


def test_a_selection_of_which_nothing_applies_is_not_green():
    scope = Scope(profile=Profile.FULL, checks=("environment.accelerator",))
    record = support.record([], scope=scope)
    assert [check.outcome for check in record.checks] == ["not_applicable"]
    assert exit_code_for(record) is ExitCode.INCOMPLETE
    assert test_of(ctrf(record), "run.verdict")["rawStatus"] == "PARTIAL"


@pytest.mark.parametrize("text", ["2026-01-02T03:16:05", "2026-01-02T04:16:05+01:00"])
def test_a_time_without_a_zone_is_utc(monkeypatch, text):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        found = epoch_ms(text)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert found == epoch_ms("2026-01-02T03:16:05Z")


def test_a_critical_check_that_is_flaky_blocks():
    results = ctrf(support.record(support.items_of_all({"architecture.weight_scale": "flaky"})))
    assert test_of(results, "architecture.weight_scale")["status"] == "passed"
    assert test_of(results, "run.verdict")["rawStatus"] == "FAIL"


def test_an_item_of_no_check_fails(run_record):
    found = test_of(ctrf(run_record("hostile")), "unknown/test_check.py::test")
    assert (found["status"], found["rawStatus"], found["suite"]) == (
        "failed",
        "unscored",
        ["unscored"],
    )
    assert found["extra"][OURS]["outcome"] == "pass"


def test_a_module_that_skipped_itself_is_named_and_not_green(run_record):
    results = ctrf(run_record("hiding"))
    found = test_of(results, "unknown.py::test")
    assert (found["status"], found["rawStatus"]) == ("other", "not_measured")
    assert found["message"] == "skipped itself whole: no GPU"
    assert test_of(results, "run.verdict")["status"] == "failed"


@pytest.mark.parametrize("kind", support.RECORDS)
def test_the_same_run_gives_the_same_bytes(kind, run_record, report_of):
    against = support.AGAINST.get(kind, tuple)()
    policy = support.POLICIES.get(kind, support.POLICY)
    again = build_report(run_record(kind), policy, *against)
    assert render_ctrf(again) == render_ctrf(report_of(kind))


def against(before, now, *, history=None, policy=support.POLICY):
    """The document of a run that is held against another."""
    base = support.baseline_of(before, policy)
    return parsed(build_report(now, support.POLICY, base, history))


def test_without_another_run_nothing_is_said_of_one(report_of):
    document = parsed(report_of("pass"))
    assert not document.keys() & {"insights", "baseline"}
    assert all("insights" not in test for test in document["results"]["tests"])


def test_rates_are_of_the_checks_that_apply():
    """By hand: 147 of 148 checks have an item; one failed, one was flaky, one had not."""
    before = support.kept_record(1)
    now = support.kept_record(2, {"data.balance": "fail", "data.leak_canary": "flaky"})
    document = against(before, now)
    total = sum(check.outcome is not Outcome.NOT_APPLICABLE for check in now.checks)
    missing = [check.id for check in before.checks if check.outcome is Outcome.NOT_MEASURED]
    insights = document["insights"]
    assert insights["runsAnalyzed"] == 1
    passed, then = (total - 1 - len(missing)) / total, (total - len(missing)) / total
    assert insights["passRate"] == {
        "current": round(passed, 6),
        "baseline": round(then, 6),
        "change": pytest.approx(passed - then, abs=2e-6),
    }
    rate = round(1 / total, 6)
    assert insights["failRate"] == {"current": rate, "baseline": 0.0, "change": rate}
    assert insights["flakyRate"] == {"current": rate, "baseline": 0.0, "change": rate}
    assert "averageRunDuration" not in insights  # a baseline keeps no duration
    failing = test_of(document["results"], "data.balance")["insights"]
    assert failing["passRate"] == {"current": 0.0, "baseline": 1.0, "change": -1.0}
    assert failing["extra"][OURS] == {"baselineOutcome": "pass", "change": "newly_failing"}
    same = test_of(document["results"], "data.loader_order")["insights"]
    assert same["extra"][OURS] == {"baselineOutcome": "pass", "change": ""}


def test_rates_over_several_runs_are_of_those_that_compare(report_of):
    """Of five runs of the trend the last three are of this machine and policy."""
    document = parsed(report_of("compared"))
    insights = document["insights"]
    assert insights["runsAnalyzed"] == 3
    assert insights["averageRunDuration"] == {"current": 12 * 60 * 1000}
    assert insights["extra"][OURS]["doNotCompare"] == 2
    points = [dict(point.counts) for point in report_of("compared").trend.points[2:]]
    green = (Outcome.PASS, Outcome.WARN, Outcome.FLAKY)
    passed = sum(counts.get(outcome, 0) for counts in points for outcome in green)
    total = sum(n for counts in points for o, n in counts.items() if o != "not_applicable")
    assert insights["passRate"]["current"] == round(passed / total, 6)
    test = test_of(document["results"], "data.leak_canary")["insights"]
    assert test == {"extra": {OURS: {"baselineOutcome": "fail", "change": "fixed"}}}


def test_the_baseline_is_named_by_the_id_of_its_own_report():
    before, now = support.kept_record(1), support.kept_record(2)
    document = against(before, now)
    alone = parsed(build_report(before, support.POLICY))
    baseline = document["baseline"]
    assert baseline["reportId"] == alone["reportId"]
    assert baseline["source"] == "run run-1"
    assert baseline["commit"] == "0123456789abcdef"
    assert baseline["extra"][OURS]["comparable"] is True
    ids = {document["reportId"], alone["reportId"]}
    ids.add(parsed(build_report(now, support.POLICY))["reportId"])
    assert len(ids) == 3


def test_a_baseline_that_does_not_compare_has_no_numbers():
    before = support.kept_record(1, cpu="EPYC")
    document = against(before, support.kept_record(2))
    assert set(document["insights"]["passRate"]) == {"current"}
    assert all("insights" not in test for test in document["results"]["tests"])
    told = document["baseline"]["extra"][OURS]
    assert (told["comparable"], len(told["breaks"])) == (False, 1)
    assert told["reason"].startswith("the machine class is")


@settings(max_examples=200, deadline=None, phases=hostile.PHASES)
@given(hostile.REPORTS)
def test_any_report_gives_a_valid_document(report):
    document = parsed(report)
    assert list(hostile.unreadable(document)) == []
    assert render_ctrf(report) == render_ctrf(report)


@pytest.mark.parametrize("text", [*hostile.WORDS, hostile.LONG], ids=range(len(hostile.WORDS) + 1))
def test_hostile_text_stays_text(text, report_of):
    report = report_of("fail")
    (first, *rest) = report.checks
    marked = dataclasses.replace(first, reason=f"a{text}z", title=text, suite=text)
    report = dataclasses.replace(report, checks=(marked, *rest))
    message = parsed(report)["results"]["tests"][0]["message"]
    assert message[0] + message[-1] == "az"
    assert len(message) >= len(text.replace("\x1b[31m", ""))
