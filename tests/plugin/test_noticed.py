"""Python warnings while a check runs: kept with it, and no outcome of it."""

from __future__ import annotations

import pytest

from forge_harness._pytest.noticed import MOST

SOURCE = """
import threading, warnings
def mine(name): return pytest.mark.forge_check("mine." + name, title="It", severity="high")

@pytest.fixture
def built():
    warnings.warn("in the fixture", FutureWarning)

@mine("a")
def test_warns(built, evidence):
    for _ in range(3):
        # A module that touches the filters makes Python forget what it has said already.
        warnings.filterwarnings("default", category=DeprecationWarning)
        warnings.warn("deprecated\\nand a second line", DeprecationWarning)
    evidence.at_most("x", 1, limit=2, reason="r")

@mine("a")
def test_is_silent(evidence):
    with pytest.warns(UserWarning):
        warnings.warn("expected", UserWarning)
    evidence.record("x", 1)

@mine("a")
def test_goes_on_and_on(evidence):
    for step in range(1000):
        warnings.warn(f"loss is nan at step {step}", RuntimeWarning)
    evidence.record("x", 1)

@mine("a")
def test_fails_too(evidence):
    warnings.warn("token ghp_0123456789abcdefghijABCDEFGHIJ456789", UserWarning)
    evidence.at_most("x", 3, limit=2, reason="r")

@mine("a")
def test_a_thread_died(evidence):
    thread = threading.Thread(target=lambda: 1 // 0)
    thread.start()
    thread.join()
    evidence.record("x", 1)

def test_without_check():
    warnings.warn("of another test", UserWarning)
"""


def test_a_warning_is_kept_and_changes_no_outcome(told):
    run = told(SOURCE)
    warns = run.items["test_warns"]
    assert warns["outcome"] == "pass"
    fixture, call = warns["warnings"]
    assert fixture.startswith("FutureWarning: in the fixture (")
    assert call.startswith("DeprecationWarning: deprecated (")
    assert call.partition(" (")[2].partition(":")[0].endswith("test_it.py")
    assert call.endswith(", 3 times")
    assert (run.outcome("test_is_silent"), run.items["test_is_silent"]["warnings"]) == ("pass", [])
    assert run.outcome("test_fails_too") == "fail"
    assert len(run.items["test_fails_too"]["warnings"]) == 1
    # They stay in pytest's own summary.
    assert "deprecated" in run.output
    assert "of another test" in run.output


def test_thousands_are_bounded_and_credentials_masked(told):
    run = told(SOURCE)
    kept = run.items["test_goes_on_and_on"]["warnings"]
    assert (len(kept), kept[-1]) == (MOST + 1, f"and {1000 - MOST} more")
    assert "ghp_" not in str(run.items["test_fails_too"]["warnings"])


def test_an_exception_that_ended_a_thread_is_an_error(told):
    run = told(SOURCE)
    assert run.outcome("test_a_thread_died") == "error"
    assert "ZeroDivisionError" in run.items["test_a_thread_died"]["log"]


RETRIED = """
import warnings
from pathlib import Path

@pytest.mark.forge_check("mine.a", title="It", severity="high")
def test_second_time(evidence):
    mark = Path("tried")
    first = not mark.exists()
    mark.touch()
    warnings.warn("first" if first else "second", UserWarning)
    evidence.equal("x", 2 if first else 1, expected=1, reason="r")
"""


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["plain", "xdist"])
def test_a_retried_item_has_those_of_its_last_attempt(told, options):
    run = told(RETRIED, "-p", "rerunfailures", "--reruns", "1", *options, subprocess=True)
    (kept,) = run.items["test_second_time"]["warnings"]
    assert kept.startswith("UserWarning: second (")


def test_who_asks_for_errors_gets_them(told):
    run = told(RETRIED, "-W", "error:first:UserWarning")
    assert run.outcome("test_second_time") == "error"
