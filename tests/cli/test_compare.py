"""compare: what changed from one run to another."""

import json

import pytest

from forge_harness.errors import ExitCode


def test_what_changed_is_shown_and_nothing_is_gated(invoke, measured):
    before, now = measured(beta="fail"), measured(gamma="fail", delta=None)
    result = invoke("compare", before, now)
    assert result.exit_code == ExitCode.PASS
    lines = [line.split() for line in result.output.splitlines()]
    (score,) = (line for line in lines if line[:1] == ["score"])
    # By hand: 8 of 12 and 3 of 3 points, capped at 79 by a failed high check; 12 of 12 and 0 of 3.
    assert score == ["score", "points", "79", "50", ">=", "77", "fail"]
    for sentence in (
        "Baseline r1: FAIL. Integration score 79 (at most 79)",
        "Newly failing: 1\n  training.gamma: pass -> fail",
        "Fixed: 1\n  data.beta: fail -> pass",
        "Newly not measured: 1\n  training.delta: pass -> not_measured",
    ):
        assert sentence in result.output, result.output


def test_json_holds_the_same(invoke, measured):
    found = json.loads(invoke("compare", measured(), measured(beta="fail"), "--json").output)
    assert (found["comparable"], found["reason"]) == (True, "")
    (score,) = found["values"]
    assert (score["baseline"], score["outcome"]) == (100.0, "fail")
    assert score["reason"].startswith("the score fell from 100 to")
    assert found["newly_failing"] == [{"check": "data.beta", "before": "pass", "after": "fail"}]
    assert found["fixed"] == found["newly_not_measured"] == []


def test_values_of_another_machine_are_not_compared(invoke, measured):
    result = invoke("compare", measured(cpu="EPYC"), measured(beta="fail"))
    assert result.exit_code == ExitCode.BASELINE_MISSING
    assert "Values do not compare: the machine class is" in result.output
    assert "Newly failing: 1\n  data.beta: pass -> fail" in result.output
    assert "points" not in result.output


def test_checks_of_one_run_only_are_named_with_their_outcomes(invoke, measured, make):
    before, now = measured(), measured(checks=(*make.checks, ("data.new", "low")), new="fail")
    output = invoke("compare", before, now).output
    assert output.endswith("\nNot compared: 1\n  data.new: not in the baseline, fail now\n")
    back = json.loads(invoke("compare", now, before, "--json").output)
    assert back["uncompared"] == [
        {"check": "data.new", "why": "not in this run, fail in the baseline"}
    ]
    assert "Not compared" not in invoke("compare", before, before).output


@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_run_is_compared_with_nothing(invoke, measured, place):
    runs = [measured(), measured()]
    (runs[place] / "run.json").write_text("{}")
    assert invoke("compare", *runs).exit_code == ExitCode.VERIFICATION_FAILED


def test_a_baseline_that_is_not_there(invoke, measured, tmp_path):
    result = invoke("compare", tmp_path / "gone", measured())
    assert result.exit_code == ExitCode.BASELINE_MISSING
    assert "No baseline" in result.output
