"""Security, power_of_ten: red for sources that break the rules, and for those it cannot read."""

from __future__ import annotations

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


def test_a_missing_tool_lowers_the_score_and_is_named(run_check, tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(SPAGHETTI)
    monkeypatch.setattr(assessment, "find_tool", lambda name: None)
    assert "not installed: ruff" in check(run_check, tmp_path).reason
