"""Security, power_of_ten: red for sources that break the rules, and for those it cannot read."""

from __future__ import annotations

import sys

import pytest

from forge_harness.config import load_config
from forge_harness.power_of_ten import assessment
from forge_harness.types import Outcome

SPAGHETTI = """
import pickle
def f(n):
    global cases
    while True:
        try:
            return f(n - 1)
        except:
            eval("n")
cases = []
queue = deque()
"""


def check(run_check, *sources):
    config = load_config(flags={"paths.sources": [str(s) for s in sources]}, environ={}).config
    return run_check("security.power_of_ten", config=config)


def test_the_harness_passes(run_check):
    run = check(run_check)
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


@pytest.mark.parametrize("code", [SPAGHETTI, "def f(:\n"])
def test_sources_that_break_the_rules_fail(run_check, tmp_path, code):
    (tmp_path / "a.py").write_text(code)
    run = check(run_check, tmp_path)
    assert run.outcome is Outcome.FAIL
    assert "power_of_ten is" in run.reason


def test_sources_without_code_fail(run_check, tmp_path):
    assert check(run_check, tmp_path).outcome is Outcome.FAIL


def test_where_a_tool_is_missing_nothing_is_measured(run_check, tmp_path, monkeypatch):
    """A user without ruff was told of bad code that nobody had looked at."""
    (tmp_path / "a.py").write_text('"""Fine."""\n')
    monkeypatch.setattr(assessment, "find_tool", lambda name: None)
    run = check(run_check, tmp_path)
    assert run.outcome is Outcome.NOT_MEASURED
    assert "not counted by ruff (not installed); pip install" in run.reason


def test_where_a_tool_refuses_nothing_is_measured(run_check, tmp_path):
    (tmp_path / "a.py").write_text('"""Fine."""\n')
    (tmp_path / "ruff.toml").write_text("no-such-key = 1\n")
    run = check(run_check, tmp_path)
    assert run.outcome is Outcome.NOT_MEASURED
    assert "not counted by ruff (" in run.reason
    assert "pip install" not in run.reason


def test_without_lizard_c_is_not_measured(run_check, tmp_path, monkeypatch):
    """A user without it was told of bad code that nobody had looked at."""
    (tmp_path / "a.c").write_text("int f() { return 0; }\n")
    monkeypatch.setitem(sys.modules, "lizard", None)
    run = check(run_check, tmp_path)
    assert run.outcome is Outcome.NOT_MEASURED
    assert "not counted by lizard (not installed); pip install" in run.reason
