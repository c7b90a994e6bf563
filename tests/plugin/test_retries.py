"""Tests that are run again, or reported otherwise, by another plugin."""

from __future__ import annotations

import pytest

RERUNS = """
from pathlib import Path
def mine(name): return pytest.mark.forge_check("mine." + name, title="It", severity="high")

@mine("a")
def test_second_time(evidence):
    mark = Path("tried")
    first = not mark.exists()
    mark.touch()
    evidence.equal("x", 2 if first else 1, expected=1, reason="r")

@mine("a")
def test_never(evidence):
    assert False, "still"
"""


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["plain", "xdist"])
def test_a_retry_that_passes_is_flaky(told, options):
    run = told(RERUNS, "-p", "rerunfailures", "--reruns", "2", *options, subprocess=True)
    second = run.items["test_second_time"]
    assert (second["outcome"], second["attempts"]) == ("flaky", 2)
    assert second["reason"] == "passed on attempt 2"
    assert [e["value"] for e in second["evidence"]] == [1], "evidence of the last attempt only"
    never = run.items["test_never"]
    assert (never["outcome"], never["attempts"], never["reason"]) == ("fail", 3, "still")


QUARANTINE = """
import pytest

calls = []

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    calls.append(call.when)
    if calls.count("call") > 1 and report.failed:
        report.outcome, report.longrepr = "passed", None
    return report
"""


def test_a_retry_that_another_plugin_calls_passed_has_failed(told, pytester):
    """It was flaky, "passed on attempt 2": half of the credit for a check that never passed."""
    pytester.makeconftest(QUARANTINE)
    never = RERUNS[RERUNS.index("def mine") : RERUNS.index("@mine")]
    source = never + '@mine("a")\ndef test_never(evidence): assert False, "still"'
    run = told(source, "-p", "rerunfailures", "--reruns", "1", subprocess=True)
    item = run.items["test_never"]
    assert (item["outcome"], item["attempts"]) == ("fail", 2)
    assert item["reason"] == "still (reported as passed by another plugin)"


RETRIES = """
import pytest

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    tries = 1
    while call.when == "call" and call.excinfo is not None and tries < 5:
        # As pytest-retry does: again within the phase, and one report of it.
        tries += 1
        item.ihook.pytest_runtest_teardown(item=item, nextitem=item.parent)
        item._initrequest()
        item.ihook.pytest_runtest_setup(item=item)
        call = pytest.CallInfo.from_call(
            lambda: item.ihook.pytest_runtest_call(item=item), when="call"
        )
        report.outcome = "failed" if call.excinfo else "passed"
    return report
"""
RETRIED = """
tries = []

@pytest.mark.forge_check("mine.a", title="It", severity="critical")
def test_third_time(evidence):
    tries.append(1)
    assert len(tries) >= 3
    evidence.record("x", 1)

@pytest.mark.forge_check("mine.b", title="It", severity="critical")
def test_first_time(evidence): evidence.record("x", 1)
"""


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["one_process", "worker"])
def test_a_retry_that_no_report_tells_of_is_flaky(told, pytester, options):
    pytester.makeconftest(RETRIES)
    run = told(RETRIED, *options, subprocess=bool(options))
    assert run.outcome("test_third_time") == "flaky"
    assert run.items["test_third_time"]["attempts"] == 3
    assert run.reason("test_third_time") == "passed on attempt 3"
    assert (run.outcome("test_first_time"), run.items["test_first_time"]["attempts"]) == ("pass", 1)


IMPROVES = """
import pytest
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and "green" in item.name:
        report.outcome, report.longrepr = "passed", None
    elif report.failed and "quarantined" in item.name:
        report.outcome, report.longrepr = "skipped", ("f", 1, "Skipped: quarantined")
    return report
"""
IMPROVED = """
import unittest
def mine(name): return pytest.mark.forge_check("mine." + name, title="It", severity="critical")

@mine("a")
def test_green(evidence):
    evidence.record("x", 1)
    assert False, "a is broken"

@mine("b")
def test_quarantined(evidence): raise OSError("b is broken")

@pytest.fixture
def bad_teardown():
    yield
    assert False, "left something behind"

@mine("c")
def test_green_but_for_teardown(bad_teardown, evidence): evidence.record("x", 1)

@mine("d")
def test_skips(evidence): raise unittest.SkipTest("not here")
"""


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["one_process", "worker"])
def test_what_was_raised_counts_whatever_another_plugin_reports(told, pytester, options):
    """Quarantine plugins turned a critical check green, and what it raised was known."""
    pytester.makeconftest(IMPROVES)
    run = told(IMPROVED, *options, subprocess=bool(options))
    assert run.outcome("test_green") == "fail"
    assert run.reason("test_green") == "a is broken (reported as passed by another plugin)"
    assert run.outcome("test_quarantined") == "error"
    assert "b is broken (reported as skipped by" in run.reason("test_quarantined")
    assert run.outcome("test_green_but_for_teardown") == "error"
    assert (run.outcome("test_skips"), run.reason("test_skips")) == ("not_measured", "not here")
