"""An item that was collected and never came back is seen."""

from __future__ import annotations

import pytest

CRASH = """
import os
@pytest.mark.forge_check("mine.a", title="It", severity="high")
@pytest.mark.parametrize("n", range(4))
def test_dies(evidence, n):
    evidence.record("x", n)
    if n == 1: os._exit(9)
"""


def test_a_crashed_worker_costs_one_item(told):
    run = told(CRASH, "-n", "1", subprocess=True)
    outcomes = {name: item["outcome"] for name, item in run.items.items()}
    assert outcomes == {
        "test_dies[0]": "pass",
        "test_dies[1]": "error",
        "test_dies[2]": "pass",
        "test_dies[3]": "pass",
    }
    assert "died" in run.reason("test_dies[1]")
    assert run.items["test_dies[1]"]["check"] == "mine.a"


LOSE = """
import pytest
def pytest_runtest_protocol(item, nextitem):
    # What a broken event loop does to a worker: the item vanishes, the exit status stays 0.
    return True if "[2]" in item.nodeid else None
"""


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_an_item_that_vanishes_is_not_measured(told, pytester, options):
    pytester.makeconftest(LOSE)
    run = told(CRASH.replace("os._exit(9)", "pass"), *options, subprocess=True)
    assert run.status == 0, "pytest itself sees nothing"
    assert run.outcome("test_dies[2]") == "not_measured"
    assert "never reported" in run.reason("test_dies[2]")
    assert run.finished["lost"] == 1


BREAK = """
def pytest_runtest_setup(item):
    raise RuntimeError("hook is broken") if "[2]" in item.nodeid else None
def pytest_runtest_logfinish(nodeid):
    if "[1]" in nodeid: raise RuntimeError("hook is broken")
"""


def test_an_internal_error_is_told(told, pytester):
    pytester.makeconftest(BREAK.replace("raise RuntimeError", "0 and print", 1))
    run = told(CRASH.replace("os._exit(9)", "pass"), subprocess=True)
    assert "hook is broken" in run.finished["error"]
    assert run.outcome("test_dies[3]") == "not_measured"
    assert "pytest broke down" in run.reason("test_dies[3]")
