"""SARIF: the official schema, levels, and results that stay the same over runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft4Validator

from forge_harness.errors import ExitCode
from forge_harness.report import build_report, render_ctrf, render_sarif, sarif_findings
from forge_harness.scoring import Scope, exit_code_for
from forge_harness.scoring.verdict import MEASURED_BAD, blocking_reasons
from forge_harness.types import Outcome, Profile, Severity

from . import hostile, support

SCHEMA = Path(__file__).parent / "schemas" / "sarif-schema-2.1.0.json"
DIGEST = "c3b4bb2d6093897483348925aaa73af03b3e3f4bd4ca38cef26dcb4212a2682e"
VALIDATOR = Draft4Validator(json.loads(SCHEMA.read_bytes()))
LEVELS = ["error", "warning", "note", "none"]
UTC_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
CRITICAL, HIGH = "architecture.weight_scale", "gates.latency"
MEDIUM, LOW = "gates.resource_use", "data.balance"
UNRUN = ("xfail", "xpass", "not_applicable", "not_measured")
"""Outcomes no item has by itself: taken as an item that did not run."""


def test_the_schema_is_the_published_one():
    assert hashlib.sha256(SCHEMA.read_bytes()).hexdigest() == DIGEST
    Draft4Validator.check_schema(VALIDATOR.schema)


def parsed(report):
    """The one run of a log, as a reader gets it: valid, with what code scanning requires."""
    text = render_sarif(report)
    log = json.loads(text.encode("utf-8").decode("utf-8"), parse_constant=pytest.fail)
    VALIDATOR.validate(log)
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    assert {rule["id"] for rule in rules} == {result["ruleId"] for result in run["results"]}
    for rule in rules:
        for name in ("shortDescription", "fullDescription", "help"):
            assert 0 < len(rule[name]["text"]) <= 1024
    for result in run["results"]:
        check_result(result, rules)
    for time in ("startTimeUtc", "endTimeUtc"):
        assert re.fullmatch(UTC_TIME, run["invocations"][0].get(time, "2026-01-02T03:04:05.000Z"))
    levels = [LEVELS.index(result["level"]) for result in run["results"]]
    assert levels == sorted(levels)
    return run


def check_result(result, rules):
    assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
    assert result["message"]["text"]
    assert not re.search(r"\]\(|(?<!\{)(?:\{\{)*\{(?!\{)", result["message"]["text"])
    assert isinstance(result["suppressions"], list)
    assert re.fullmatch(r"[0-9a-f]{16}:1", result["partialFingerprints"]["primaryLocationLineHash"])
    (location,) = result["locations"]
    place = location["physicalLocation"]
    assert place["region"]["startLine"] == 1
    uri = place["artifactLocation"]["uri"]
    split = urlsplit(uri)
    assert uri.isascii()
    assert not re.search(r"[\s\\<>\"{}|^`]|%(?![0-9A-F]{2})", uri)
    assert (split.scheme, split.netloc, split.query, split.fragment) == ("", "", "", "")
    assert split.path
    assert not split.path.startswith("/")


def sarif(record):
    return parsed(build_report(record, support.POLICY))


def result_of(run, rule):
    (found,) = [result for result in run["results"] if result["ruleId"] == rule]
    return found


def rule_ids(run):
    return [result["ruleId"] for result in run["results"]]


@pytest.mark.parametrize("kind", support.RECORDS)
def test_what_is_no_pass_is_one_result_with_its_rule(kind, run_record):
    record = run_record(kind)
    run = sarif(record)
    fine = (Outcome.PASS, Outcome.NOT_APPLICABLE)
    expected = {check.id: check for check in record.checks if check.outcome not in fine}
    found = [name for name in rule_ids(run) if not name.startswith("run.")]
    assert sorted(found) == sorted(expected)
    for rule in run["tool"]["driver"]["rules"]:
        if check := expected.get(rule["id"]):
            facts = {name: getattr(check, name) for name in ("severity", "component", "version")}
            assert rule["properties"] == facts


@pytest.mark.parametrize(
    ("check", "outcome", "level"),
    [
        (CRITICAL, "fail", "error"),
        (HIGH, "fail", "error"),
        (CRITICAL, "error", "error"),
        (HIGH, "error", "error"),
        (CRITICAL, "flaky", "error"),  # blocks, as the verdict has it
        (HIGH, "flaky", "warning"),
        (MEDIUM, "fail", "warning"),
        (LOW, "error", "warning"),
        (LOW, "warn", "warning"),
        (CRITICAL, "not_measured", "warning"),
        (HIGH, None, "warning"),
        (MEDIUM, "not_measured", "note"),
        (LOW, None, "note"),
    ],
)
def test_levels(check, outcome, level):
    run = sarif(support.record(support.items_of_all({check: outcome})))
    found = result_of(run, check)
    assert found["level"] == level
    assert found["properties"]["outcome"] == outcome or outcome is None


def test_a_waiver_that_is_not_needed_is_an_error():
    found = result_of(sarif(support.record(waivers=support.WAIVERS[:1])), "state.io_errors")
    assert (found["level"], found["suppressions"]) == ("error", [])


def test_a_waived_failure_is_a_suppressed_note(run_record):
    run = sarif(run_record("fail"))
    found = result_of(run, "state.io_errors")
    assert found["level"] == "note"
    assert found["suppressions"] == [
        {
            "kind": "external",
            "status": "accepted",
            "justification": "needs the new kernel (storage team, https://example.org/17, "
            "until 2026-03-01)",
        }
    ]
    # The waiver of this one has expired.
    assert [r["ruleId"] for r in run["results"] if r["suppressions"]] == ["state.io_errors"]


def waiver(check, **fields):
    return support.WAIVERS[0].model_copy(update={"check": check, **fields})


def test_a_waiver_that_is_not_needed_is_an_error_whatever_the_severity():
    found = result_of(sarif(support.record(waivers=[waiver(LOW)])), LOW)
    assert (found["level"], found["properties"]["outcome"]) == ("error", "xpass")


def test_of_a_selection_any_failure_is_an_error():
    scope = Scope(profile=Profile.FULL, checks=(LOW,))
    run = sarif(support.record([support.item(LOW, "fail")], scope=scope))
    assert run["properties"]["verdict"] == "PARTIAL"
    assert result_of(run, LOW)["level"] == "error"


def test_a_critical_check_whose_flakiness_is_waived_is_a_note():
    run = sarif(
        support.record(support.items_of_all({CRITICAL: "flaky"}), waivers=[waiver(CRITICAL)])
    )
    assert result_of(run, CRITICAL)["level"] == "note"


def test_only_waivers_that_have_not_expired_suppress():
    given = [waiver(LOW), waiver(LOW, expires="2025-01-01"), waiver(LOW)]
    run = sarif(support.record(support.items_of_all({LOW: "fail"}), waivers=given))
    (suppression,) = result_of(run, LOW)["suppressions"]
    assert "until 2026-03-01" in suppression["justification"]


@pytest.mark.parametrize(
    ("check", "level"),
    [(CRITICAL, "error"), (HIGH, "error"), (MEDIUM, "warning"), (LOW, "note")],
)
def test_the_level_of_a_rule_is_that_of_its_severity(check, level):
    run = sarif(support.record(support.items_of_all({check: "fail"})))
    (rule,) = [rule for rule in run["tool"]["driver"]["rules"] if rule["id"] == check]
    assert rule["defaultConfiguration"] == {"level": level}
    assert rule["help"]["text"].startswith(f"Reproduce: forge-harness run --check {check}")


def test_a_result_says_why_and_where(run_record):
    found = result_of(sarif(run_record("fail")), CRITICAL)
    assert found["message"]["text"] == f"{CRITICAL} ended fail"
    assert found["locations"][0]["physicalLocation"]["artifactLocation"] == {
        "uri": "architecture/test_weight_scale.py",
        "uriBaseId": "SUITES",
    }


def test_a_check_that_nothing_ran_for_is_in_the_catalogue(run_record):
    found = result_of(sarif(run_record("fail")), HIGH)
    place = found["locations"][0]["physicalLocation"]["artifactLocation"]
    assert place["uri"] == "catalogue.toml"


def test_a_file_name_is_written_as_an_address(report_of):
    report = report_of("fail")
    item = dataclasses.replace(report.unscored[0] if report.unscored else hostile.CHECK.items[0])
    item = dataclasses.replace(item, nodeid="ä b/test:x#1?.py::test[a::b]")
    run = parsed(dataclasses.replace(report, unscored=(item,)))
    place = result_of(run, "run.unscored")["locations"][0]["physicalLocation"]["artifactLocation"]
    assert unquote(place["uri"]) == "ä b/test:x#1?.py"


def test_the_severest_come_first(run_record):
    run = sarif(run_record("fail"))
    assert rule_ids(run)[0] == CRITICAL
    order = [
        (LEVELS.index(r["level"]), list(Severity).index(r["properties"]["severity"]))
        for r in run["results"]
    ]
    assert order == sorted(order)


def test_a_green_run_has_no_results(run_record):
    run = sarif(run_record("pass"))
    assert (run["results"], run["tool"]["driver"]["rules"]) == ([], [])


def test_times_and_facts_of_the_run(run_record):
    run = sarif(run_record("pass"))
    assert run["invocations"] == [
        {
            "executionSuccessful": True,
            "startTimeUtc": "2026-01-02T03:04:05.000Z",
            "endTimeUtc": "2026-01-02T03:16:05.000Z",
            "toolExecutionNotifications": [],
        }
    ]
    assert run["automationDetails"]["id"] == "forge-harness/toy/full/20260102T030405Z-0a1b2c3d"
    facts = run["properties"]
    assert (facts["verdict"], facts["score"]) == ("PASS", {"low": 100, "high": 100})
    assert facts["policyDigest"] == support.POLICY.digest


def test_a_run_that_was_stopped_was_not_executed_successfully(run_record):
    (invocation,) = sarif(run_record("interrupted"))["invocations"]
    assert invocation["executionSuccessful"] is False
    assert "endTimeUtc" not in invocation
    (alert,) = invocation["toolExecutionNotifications"]
    assert (alert["level"], "is interrupted" in alert["message"]["text"]) == ("error", True)


def test_shards_and_subjects_do_not_replace_each_other():
    def category(subject, shard):
        scope = Scope(profile=Profile.QUICK, checks=(LOW,), shard=shard)
        other = support.SubjectRecord(spec="a.py:S", name=subject, capabilities=[])
        record = support.record([support.item(LOW)], scope=scope, subject=other)
        return sarif(record)["automationDetails"]["id"].rpartition("/")[0]

    found = [category("a", "1/2"), category("a", "2/2"), category("a/b", "1/2"), category("a", "")]
    assert found[0] == "forge-harness/a/quick/shard~201~2f2"
    assert len(set(found)) == 4


def test_fingerprints_do_not_change_with_reason_time_or_line(run_record):
    def prints(record):
        results = sarif(record)["results"]
        return {result["ruleId"]: result["partialFingerprints"] for result in results}

    items = [
        item.model_copy(
            update={"reason": "another", "duration_s": 9.0, "nodeid": f"{item.nodeid}2"}
        )
        for item in support.items_of_all(support.FAILING)
    ]
    other = support.record(
        items,
        waivers=support.WAIVERS,
        run_id="x",
        started_at="2026-02-02T00:00:00Z",
        finished_at="2026-02-02T00:00:01Z",
    )
    before = prints(run_record("fail"))
    assert prints(other) == before
    assert len({tuple(value.values()) for value in before.values()}) == len(before) == 7


def test_two_items_of_no_check_have_two_fingerprints(report_of):
    items = tuple(
        dataclasses.replace(hostile.CHECK.items[0], nodeid=f"a.py::{name}") for name in "xy"
    )
    run = parsed(dataclasses.replace(report_of("pass"), unscored=items))
    found = [r for r in run["results"] if r["ruleId"] == "run.unscored"]
    assert [r["level"] for r in found] == ["error", "error"]
    assert found[0]["partialFingerprints"] != found[1]["partialFingerprints"]


def test_an_item_of_no_check_is_an_error(run_record):
    found = result_of(sarif(run_record("hostile")), "run.unscored")
    assert found["message"]["text"].startswith("unknown/test_check.py::test belongs to no check")


def test_a_module_that_skipped_itself_is_named_and_not_green(run_record):
    run = sarif(run_record("hiding"))
    assert result_of(run, "run.uncollected")["level"] == "warning"
    assert "no GPU" in result_of(run, "run.uncollected")["message"]["text"]
    assert result_of(run, "run.verdict")["level"] == "error"


def test_nothing_but_the_verdict_says_that_a_run_was_stopped():
    run = sarif(support.record(state="interrupted"))
    assert rule_ids(run) == ["run.verdict"]
    text = run["results"][0]["message"]["text"]
    assert text.startswith("INCOMPLETE: the run is interrupted: stopped by Ctrl-C")


def many(report, count, severity="low"):
    check = dataclasses.replace(
        hostile.CHECK, outcome=Outcome.FAIL, severity=Severity(severity), items=()
    )
    return dataclasses.replace(
        report, checks=tuple(dataclasses.replace(check, id=f"a.b{i}") for i in range(count))
    )


def test_the_limit_is_what_github_shows():
    assert sarif_findings.MAX_RESULTS == 5000


@pytest.fixture
def limit(monkeypatch):
    """A lower limit: the schema takes its time for thousands of results."""
    monkeypatch.setattr(sarif_findings, "MAX_RESULTS", 20)
    return 20


def test_as_many_results_as_are_shown(limit, report_of):
    run = parsed(many(report_of("pass"), limit))
    assert len(run["results"]) == limit
    assert "run.more" not in rule_ids(run)


def test_more_results_than_are_shown(limit, report_of):
    report = many(report_of("pass"), limit + 7)
    last = dataclasses.replace(report.checks[-1], severity=Severity.CRITICAL)
    run = parsed(dataclasses.replace(report, checks=(*report.checks[:-1], last)))
    assert len(run["results"]) == limit
    # The one that blocks is first, though it was last in the record.
    assert rule_ids(run)[0] == last.id
    more = run["results"][-1]
    assert (more["ruleId"], more["level"]) == ("run.more", "warning")
    assert more["message"]["text"].startswith("8 more results are not in this file")


OUTCOMES = st.dictionaries(
    st.sampled_from([CRITICAL, HIGH, MEDIUM, LOW, "state.io_errors"]),
    st.sampled_from(["pass", "flaky", "fail", "error", "not_measured", None]),
)


@settings(max_examples=40, deadline=None)
@given(
    outcomes=OUTCOMES,
    is_selection=st.booleans(),
    is_waived=st.booleans(),
    is_stopped=st.booleans(),
    hides=st.booleans(),
)
def test_both_formats_are_red_when_the_run_ends_with_another_code_than_0(
    outcomes, is_selection, is_waived, is_stopped, hides
):
    """Against the exit codes and blocking reasons of the score, which nothing here reads."""
    scope = support.FULL
    items = support.items_of_all(outcomes)
    if is_selection:
        scope = Scope(profile=Profile.FULL, checks=tuple(outcomes))
        items = [item for item in items if item.check in outcomes]
    if hides:
        items.append(support.item("unknown", "not_measured", reason="no GPU", rows=[]))
    record = support.record(
        items,
        scope=scope,
        waivers=support.WAIVERS[:1] if is_waived else (),
        state="interrupted" if is_stopped else "finished",
    )
    report = build_report(record, support.POLICY)
    results = parsed(report)["results"]
    summary = json.loads(render_ctrf(report))["results"]["summary"]
    errors = {result["ruleId"] for result in results if result["level"] == "error"}
    if exit_code_for(record) is ExitCode.PASS:
        assert errors == set()
    else:
        assert errors
        assert summary["failed"] > 0
    in_selection = record.verdict == "PARTIAL"
    assert errors - {"run.verdict"} == {
        check.id
        for check in record.checks
        if blocking_reasons([check], ()) or (in_selection and check.outcome in MEASURED_BAD)
    }


@pytest.mark.parametrize("kind", support.RECORDS)
def test_the_same_run_gives_the_same_bytes(kind, run_record, report_of):
    against = support.AGAINST.get(kind, tuple)()
    policy = support.POLICIES.get(kind, support.POLICY)
    again = build_report(run_record(kind), policy, *against)
    assert render_sarif(again) == render_sarif(report_of(kind))


def against(before, now, policy=support.POLICY):
    """The log of a run that is held against another."""
    return parsed(build_report(now, support.POLICY, support.baseline_of(before, policy)))


def states(run):
    return {result["ruleId"]: result.get("baselineState") for result in run["results"]}


def test_without_a_baseline_no_result_has_a_state(report_of):
    run = parsed(report_of("fail"))
    assert set(states(run).values()) == {None}
    assert "baselineGuid" not in run
    assert all("kind" not in result for result in run["results"])


def test_each_result_has_its_state_against_the_baseline(report_of):
    run = parsed(report_of("compared"))
    assert states(run) == {
        "architecture.weight_scale": "new",
        "security.tls_1_3_only": "new",
        "data.balance": "new",
        "training.overfit_one_batch": "unchanged",
        "state.io_errors": "new",
        "performance.load_10x": "updated",  # failed before, not measured now
        "data.leak_canary": "absent",
        "data.loader_order": "absent",
    }
    gone = result_of(run, "data.leak_canary")
    assert (gone["kind"], gone["level"]) == ("pass", "none")
    assert gone["message"]["text"].endswith("passes now; in the baseline it ended as fail.")
    assert result_of(run, "performance.load_10x")["properties"]["baselineOutcome"] == "fail"


def test_the_baseline_is_the_run_of_its_own_log():
    before, now = support.kept_record(1), support.kept_record(2)
    run = against(before, now)
    alone = sarif(before)
    assert run["baselineGuid"] == alone["automationDetails"]["guid"]
    assert run["automationDetails"]["guid"] == sarif(now)["automationDetails"]["guid"]
    assert run["baselineGuid"] != run["automationDetails"]["guid"]


def test_against_a_baseline_that_does_not_compare_no_result_has_a_state():
    """All of them have one or none: the policy of the baseline may have judged otherwise."""
    before = support.kept_record(1, {"data.balance": "fail"}, policy=support.STRICTER)
    run = against(before, support.kept_record(2, {"data.balance": "fail"}), support.STRICTER)
    assert set(states(run).values()) == {None}
    assert "baselineGuid" not in run
    told = run["properties"]["baseline"]
    assert (told["runId"], told["comparable"]) == ("run-1", False)
    assert told["reason"].startswith("the policies differ")


def with_items(day, *names, hides=False, outcomes=None):
    outcome, rows = ("not_measured", []) if hides else ("pass", None)
    more = [
        support.item("unknown" if hides else name, outcome, rows=rows).model_copy(
            update={"nodeid": name}
        )
        for name in names
    ]
    fields = support.kept_fields(day)
    return support.record([*support.items_of_all(outcomes), *more], **fields)


@pytest.mark.parametrize(("hides", "rule"), [(False, "run.unscored"), (True, "run.uncollected")])
def test_items_of_no_check_have_states_too(hides, rule):
    before = with_items(1, "a.py::x", "b.py::y", hides=hides)
    now = with_items(2, "b.py::y", "c.py::z", hides=hides)
    found = {
        result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"]: result["baselineState"]
        for result in against(before, now)["results"]
        if result["ruleId"] == rule
    }
    assert found == {"a.py::x": "absent", "b.py::y": "unchanged", "c.py::z": "new"}


OPEN = {HIGH: None}


@pytest.mark.parametrize(
    ("before", "now", "state"),
    [
        ({}, OPEN, "new"),
        (OPEN, OPEN, "unchanged"),
        ({CRITICAL: "fail"}, OPEN, "updated"),
        (OPEN, {}, "absent"),
        ({}, {}, None),
        (OPEN, {CRITICAL: "fail"}, None),  # its errors are the results
    ],
)
def test_the_verdict_has_a_state(before, now, state):
    runs = [support.kept_record(day, outcomes) for day, outcomes in ((1, before), (2, now))]
    assert states(against(*runs)).get("run.verdict") == state


@settings(max_examples=60, deadline=None, phases=hostile.PHASES)
@given(
    st.dictionaries(st.sampled_from([CRITICAL, HIGH, MEDIUM, LOW]), st.sampled_from(Outcome)),
    st.dictionaries(st.sampled_from([CRITICAL, HIGH, MEDIUM, LOW]), st.sampled_from(Outcome)),
)
def test_the_states_are_those_of_two_logs_side_by_side(before, now):
    """The oracle: results of the log of each run alone, by rule."""
    first, second = (
        support.kept_record(day, {k: None if v in UNRUN else v for k, v in outcomes.items()})
        for day, outcomes in ((1, before), (2, now))
    )
    had, has = (
        {r["ruleId"]: r["properties"]["outcome"] for r in sarif(run)["results"]}
        for run in (first, second)
    )
    expected = {name: "absent" for name in had.keys() - has.keys()}
    expected |= {
        name: "new" if name not in had else "unchanged" if had[name] == outcome else "updated"
        for name, outcome in has.items()
    }
    found = states(against(first, second))
    for told in (expected, found):
        told.pop("run.verdict", None)  # listed or not, it has a test of its own
    assert found == expected


def test_dropped_results_have_a_state_too(monkeypatch):
    monkeypatch.setattr(sarif_findings, "MAX_RESULTS", 2)
    now = support.kept_record(2, {CRITICAL: "fail", HIGH: "fail", MEDIUM: "fail"})
    run = against(support.kept_record(1), now)
    assert states(run)["run.more"] == "new"


@settings(max_examples=200, deadline=None, phases=hostile.PHASES)
@given(hostile.REPORTS)
def test_any_report_gives_a_valid_log(report):
    run = parsed(report)
    assert list(hostile.unreadable(run)) == []
    for name in ("startTimeUtc", "endTimeUtc"):
        if name in run["invocations"][0]:
            datetime.fromisoformat(run["invocations"][0][name])


@pytest.mark.parametrize("text", [*hostile.WORDS, hostile.LONG], ids=range(len(hostile.WORDS) + 1))
def test_hostile_text_stays_text(text, report_of):
    changed = dataclasses.replace(hostile.CHECK, reason=f"a{text}z", title=text, component=text)
    run = parsed(dataclasses.replace(report_of("pass"), checks=(changed,)))
    message = run["results"][0]["message"]["text"]
    assert message[0] + message[-1] == "az"
    assert len(message) >= len(text.replace("\x1b[31m", ""))
