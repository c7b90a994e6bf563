"""JUnit XML: counts, and nothing green that is not."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from forge_harness.report import build_report, render_junit
from forge_harness.scoring import Scope, exit_code_for
from forge_harness.types import Profile

from . import support

TAGS = {"failures": "failure", "errors": "error", "skipped": "skipped"}


def junit(record):
    return ElementTree.fromstring(render_junit(build_report(record, support.POLICY)).encode())


@pytest.mark.parametrize("kind", support.RECORDS)
def test_counts_are_those_of_the_cases(kind, run_record):
    root = junit(run_record(kind))
    for node in (root, *root.findall("testsuite")):
        cases = list(node.iter("testcase"))
        assert int(node.get("tests")) == len(cases)
        for plural, tag in TAGS.items():
            assert int(node.get(plural)) == sum(case.find(tag) is not None for case in cases)
    suites = [s for s in root.findall("testsuite") if s.get("name") not in ("unscored", "run")]
    record = run_record(kind)
    assert [s.get("name") for s in suites] == [suite.name for suite in record.suites]
    assert sum(int(s.get("tests")) for s in suites) == len(record.checks)


def case_of(root, check):
    suite, _, name = check.partition(".")
    return root.find(f".//testcase[@classname='{suite}'][@name='{name}']")


@pytest.mark.parametrize(
    ("check", "outcome", "tag", "kind"),
    [
        ("architecture.weight_scale", "fail", "failure", "forge.fail"),
        ("architecture.weight_scale", "error", "error", "forge.error"),
        ("architecture.weight_scale", None, "error", "forge.not_measured"),  # critical
        ("gates.latency", "not_measured", "error", "forge.not_measured"),  # high
        ("gates.resource_use", "not_measured", "skipped", None),  # medium
        ("data.balance", None, "skipped", None),  # low
        ("data.balance", "warn", "system-out", None),
        ("training.overfit_one_batch", "flaky", "system-out", None),
    ],
)
def test_outcomes(check, outcome, tag, kind):
    root = junit(support.record(support.items_of_all({check: outcome})))
    (child,) = case_of(root, check)
    assert (child.tag, child.get("type")) == (tag, kind)


def test_a_pass_has_no_children_and_a_waived_failure_is_skipped(run_record):
    root = junit(run_record("fail"))
    assert list(case_of(root, "data.splits_disjoint")) == []
    assert case_of(root, "state.io_errors").find("skipped").get("message").startswith("xfail: ")


def test_a_waiver_that_is_not_needed_fails():
    record = support.record(waivers=support.WAIVERS[:1])
    assert case_of(junit(record), "state.io_errors").find("failure").get("type") == "forge.xpass"


def test_a_failure_says_what_missed_and_how_to_reproduce_it(run_record):
    text = case_of(junit(run_record("fail")), "architecture.weight_scale").find("failure").text
    assert "weight_scale: 0.5, expected at least 0.9 (a stated reason)" in text
    assert "Reproduce: forge-harness run --check architecture.weight_scale" in text
    assert "assert 1 == 2" in text


def test_a_run_that_is_not_green_has_no_green_file():
    """Every check passed before the run was stopped: nothing but the verdict says INCOMPLETE."""
    record = support.record(state="interrupted")
    assert record.verdict == "INCOMPLETE"
    root = junit(record)
    (error,) = root.iter("error")
    assert error.get("type") == "forge.INCOMPLETE"
    assert root.get("errors") == "1"


@pytest.mark.parametrize(("outcome", "errors"), [("pass", 0), ("not_measured", 1)])
def test_a_selection_of_which_something_was_not_measured_is_not_green(outcome, errors):
    """Of a medium check that is a skipped case only, and `run` ends with 7."""
    record = support.record(
        [support.item("data.balance", outcome)],
        scope=Scope(profile=Profile.FULL, checks=("data.balance",)),
    )
    assert record.checks[0].severity in ("medium", "low")
    assert len(list(junit(record).iter("error"))) == errors
    assert (exit_code_for(record) == 0) is (errors == 0)


def test_a_green_run_has_no_case_for_the_verdict(run_record):
    root = junit(run_record("pass"))
    assert (root.get("failures"), root.get("errors"), root.get("tests")) == ("0", "0", "148")


def test_an_item_of_no_check_is_an_error(run_record):
    suite = junit(run_record("hostile")).find("testsuite[@name='unscored']")
    assert suite.find("testcase/error").get("type") == "forge.unscored"


def test_a_module_that_skipped_itself_is_an_error_with_its_reason(run_record):
    suite = junit(run_record("hiding")).find("testsuite[@name='unscored']")
    (error,) = suite.iter("error")
    assert error.get("type") == "forge.not_measured"
    assert error.get("message") == "skipped itself whole: no GPU"
