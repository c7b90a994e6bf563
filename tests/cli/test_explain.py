"""explain: the waterfall adds up to the score, folded or not."""

import json
from decimal import Decimal
from fractions import Fraction

import pytest

from forge_harness.errors import ExitCode
from forge_harness.rundir import read_record


def rows(output):
    table = output.split("\n\n")[1].splitlines()[1:]
    return [line.split()[:2] for line in table]


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 20])
def test_the_column_adds_up_to_the_score_however_much_is_shown(invoke, run_of, limit):
    run = run_of(alpha=None, beta="fail", gamma="warn", delta=None)
    low = read_record(run).score.low
    output = invoke("explain", run, "--limit", limit).output
    steps = rows(output)[1:]
    lost = sum((Decimal(points) for points, _ in steps), Decimal(0))
    assert lost == low - 100
    assert Decimal(steps[-1][1]) == low
    assert ("more check" in output) is (limit in (1, 2, 3))


def test_a_perfect_run_needs_no_way_back(invoke, run_of):
    output = invoke("explain", run_of()).output
    assert "Integration score 100 (at most 100), 100 % measured" in output
    assert "The score is at 80 or above." in output


def test_the_way_back_leads_to_the_target(invoke, run_of):
    run = run_of(alpha="fail", beta="fail")
    output = invoke("explain", run, "--target", 90).output
    assert "A short way to 90" in output
    assert "data.alpha" in output.partition("A short way")[2]
    document = json.loads(invoke("explain", run, "--json", "--target", 90).output)
    repairs = document["way_back"]["repairs"]
    assert repairs[-1]["low_after"] >= 90
    assert document["score"]["low"] == read_record(run).score.low
    assert (
        sum(Fraction(step["points"]) for step in document["steps"])
        == 100 - document["score"]["low"]
    )


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_forged_run_is_not_explained(invoke, run_of, options):
    run = run_of(alpha="fail")
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace('"FAIL"', '"PASS"'))
    result = invoke("explain", run, *options)
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    assert result.stdout == ""
    assert f"Refused: {run} does not verify" in result.stderr


def test_a_killed_run_is_not_explained(invoke, run_of):
    assert invoke("explain", run_of(seal=False)).exit_code == ExitCode.INCOMPLETE


def test_a_step_that_costs_nothing_has_no_sign(invoke, run_of):
    # A cap no tighter than what is lost already.
    output = invoke("explain", run_of(alpha="fail", beta="fail", gamma="fail")).output
    assert "a high check fails" in output
    assert "-0.00" not in output
