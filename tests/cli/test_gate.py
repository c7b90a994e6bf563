"""gate: the exit code CI trusts."""

import json

import pytest

from forge_harness.errors import ExitCode

GOOD = {}
WARNED = {"gamma": "warn"}
FAILED = {"beta": "fail"}
OPEN = {"alpha": None}


@pytest.mark.parametrize(
    ("outcomes", "fail_on", "code"),
    [
        (GOOD, "incomplete", ExitCode.PASS),
        (GOOD, "warn", ExitCode.PASS),
        (GOOD, "fail", ExitCode.PASS),
        (WARNED, "incomplete", ExitCode.PASS),
        (WARNED, "warn", ExitCode.GATE_FAILED),
        (WARNED, "fail", ExitCode.PASS),
        (OPEN, "incomplete", ExitCode.INCOMPLETE),
        (OPEN, "warn", ExitCode.INCOMPLETE),
        (OPEN, "fail", ExitCode.PASS),
        (FAILED, "incomplete", ExitCode.GATE_FAILED),
        (FAILED, "warn", ExitCode.GATE_FAILED),
        (FAILED, "fail", ExitCode.GATE_FAILED),
        ({**FAILED, **OPEN}, "fail", ExitCode.GATE_FAILED),
    ],
)
def test_the_exit_code_follows_the_verdict(invoke, run_of, outcomes, fail_on, code):
    result = invoke("gate", run_of(**outcomes), "--fail-on", fail_on)
    assert result.exit_code == code
    assert f"Exit code {int(code)}: " in result.output


def test_incomplete_fails_unless_the_user_says_otherwise(invoke, run_of):
    assert invoke("gate", run_of(**OPEN)).exit_code == ExitCode.INCOMPLETE


def test_an_accepted_gap_is_called_one(invoke, run_of):
    result = invoke("gate", run_of(**OPEN), "--fail-on", "fail")
    assert (
        "INCOMPLETE is accepted by --fail-on fail; what is missing is not proved" in result.output
    )


def test_a_selection_is_never_a_release(invoke, run_of):
    run = run_of(selection=("data",))
    assert invoke("gate", run).exit_code == ExitCode.INCOMPLETE
    assert "PARTIAL, quick scope: 2 of 4 checks (selection: data)" in invoke("gate", run).output


@pytest.mark.parametrize("state", ["interrupted", "aborted"])
@pytest.mark.parametrize("fail_on", ["fail", "incomplete", "warn"])
def test_a_run_that_did_not_finish_never_passes(invoke, run_of, state, fail_on):
    result = invoke("gate", run_of(state), "--fail-on", fail_on)
    assert result.exit_code == ExitCode.INCOMPLETE
    assert f"the run is {state}: because" in result.output


def test_a_killed_run_is_refused(invoke, run_of):
    run = run_of(seal=False)
    result = invoke("gate", run, "--fail-on", "fail")
    assert result.exit_code == ExitCode.INCOMPLETE
    assert result.stderr == (
        f"Error: Refused: the run in {run} did not finish; run it again to gate it.\n"
    )


def _edit(run, **fields):
    record = json.loads((run / "run.json").read_bytes())
    (run / "run.json").write_text(json.dumps(record | fields), encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: _edit(run, verdict="PASS"),
        lambda run: (run / "run.json").write_text("{"),
        lambda run: (run / "run.json").unlink(),
        lambda run: (run / "policy.json").write_text("{}"),
        lambda run: (run / "policy.json").unlink(),
        lambda run: (run / "manifest.json").unlink(),
        lambda run: (run / "items.jsonl").write_text(""),
        lambda run: (run / "extra.txt").write_text("x"),
    ],
)
def test_a_damaged_run_is_refused_whatever_it_says(invoke, run_of, damage):
    run = run_of()
    assert invoke("gate", run).exit_code == ExitCode.PASS
    damage(run)
    result = invoke("gate", run)
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    assert result.stderr.startswith("Error: Refused: ")
    assert "Exit code" not in result.output


@pytest.mark.parametrize("command", ["gate", "verify", "explain", "report"])
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing", "missing does not exist; expected the directory of a run."),
        ("file", "file is a file; expected the directory of a run."),
        ("empty", "empty holds no run.json; expected the directory of a run"),
    ],
)
def test_a_wrong_directory_is_a_usage_error(invoke, tmp_path, command, name, sentence):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    result = invoke(command, tmp_path / name)
    assert result.exit_code == ExitCode.USAGE
    assert sentence in result.stderr


def test_no_annotations_outside_github(invoke, run_of):
    assert "::" not in invoke("gate", run_of(**FAILED)).output


def test_annotations_in_github(invoke, run_of, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    lines = invoke("gate", run_of(**FAILED, **WARNED)).output.splitlines()
    assert "::error title=data.beta (high)%3A fail::why fail" in lines
    assert "::warning title=training.gamma (medium)%3A warn::why warn" in lines


def test_the_step_summary_is_appended(invoke, run_of, monkeypatch, tmp_path):
    target = tmp_path / "summary.md"
    target.write_text("earlier step\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(target))
    assert invoke("gate", run_of(**FAILED)).exit_code == ExitCode.GATE_FAILED
    text = target.read_text(encoding="utf-8")
    assert text.startswith("earlier step\n")
    assert "FAIL" in text
    assert "data.beta" in text
