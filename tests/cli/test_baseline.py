"""baseline: the accepted run as a file that is reviewed like code."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from forge_harness.errors import ExitCode
from forge_harness.rundir import RunDirectory, read_items, read_policy, read_record
from forge_harness.scoring import assemble, context_of, verify_run

OWNED = ("--owner", "ada", "--reason", "new recipe, see #12")


@pytest.fixture
def accept(invoke, tmp_path):
    """Accepts a run, into b.json unless told otherwise."""

    def run(directory, *options, out="b.json"):
        return invoke("baseline", "accept", directory, *OWNED, "--out", tmp_path / out, *options)

    return run


def test_an_accepted_run_is_a_file(accept, invoke, measured, tmp_path):
    result = accept(measured())
    assert result.exit_code == ExitCode.PASS, result.output
    assert "b.json: run r1, PASS. Integration score 100 (at most 100)" in result.output
    values = json.loads((tmp_path / "b.json").read_text())
    assert values["acceptance"]["owner"] == "ada"
    assert values["score"] == {"high": 100, "low": 100}
    shown = invoke("baseline", "show", tmp_path / "b.json")
    assert "by ada: new recipe, see #12" in shown.output
    assert json.loads(invoke("baseline", "show", tmp_path / "b.json", "--json").output) == values


@pytest.mark.parametrize(
    ("outcomes", "code", "sentence"),
    [
        ({}, ExitCode.PASS, "Not worse than baseline r1."),
        ({"gamma": "warn"}, ExitCode.GATE_FAILED, "the score fell from 100 to"),
    ],
)
def test_a_gate_holds_a_run_against_the_file(
    accept, invoke, measured, tmp_path, outcomes, code, sentence
):
    before = measured()
    accept(before)
    for held in (tmp_path / "b.json", before):
        result = invoke("gate", measured(**outcomes), "--baseline", held)
        assert result.exit_code == code
        assert sentence in result.output


def test_the_id_of_a_run_writes_no_lines_of_its_own(accept, measured):
    run = measured()
    record, policy = read_record(run), read_policy(run)
    context = replace(context_of(record), run_id="r\nr2: PASS\x1b[31m")
    directory = RunDirectory.open_existing(run)
    forged = assemble(policy, read_items(run), scope=record.scope, context=context)
    directory.write_final(forged, policy)
    directory.seal()
    (line,) = accept(run).output.splitlines()
    assert "b.json: run r\\nr2: PASS\\x1b[31m, PASS. Integration" in line


@pytest.mark.parametrize("out", ["forge-baseline.json", "report.md", "logs/b.json"])
def test_a_file_within_a_run_is_refused(invoke, measured, out):
    run = measured()
    result = invoke("baseline", "accept", run, *OWNED, "--out", run / out)
    assert result.exit_code == ExitCode.USAGE
    assert "which would no longer verify; choose a file outside of it." in result.stderr
    assert verify_run(run) == []


@pytest.mark.parametrize("command", ["gate", "report", "compare"])
def test_a_file_with_a_key_twice_is_no_baseline(accept, invoke, measured, tmp_path, command):
    accept(measured())
    file, run = tmp_path / "b.json", measured(gamma="warn")
    text = file.read_text().rstrip()
    assert '"score": {' in text
    # Last of two, it would let every drop of the score pass.
    file.write_text(text[:-1] + ', "score": {"low": 0, "high": 0}}')
    words = ("compare", file, run) if command == "compare" else (command, run, "--baseline", file)
    result = invoke(*words)
    assert result.exit_code == ExitCode.BASELINE_MISSING
    sentence = f"Error: No baseline: {file} is no baseline: key 'score' is there twice.\n"
    assert result.stderr == sentence


def test_file_and_directory_say_the_same(accept, invoke, measured, tmp_path):
    before, now = measured(beta="fail"), measured(gamma="fail", delta=None)
    # A run that failed is accepted by nobody; the comparison is of another one.
    before = measured(delta="warn")
    accept(before)
    for command in (("compare",), ("compare", "--json")):
        outputs = {invoke(*command, held, now).output for held in (before, tmp_path / "b.json")}
        assert len(outputs) == 1
    for held in (before, tmp_path / "b.json"):
        out = tmp_path / f"out-{held.name}"
        invoke("report", now, "--format", "md", "--out", out, "--baseline", held)
    pages = {(tmp_path / f"out-{h}" / "report.md").read_text() for h in (before.name, "b.json")}
    assert len(pages) == 1
    assert "training.gamma" in pages.pop()


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        ({"alpha": "fail"}, "it failed; mend it, or waive what is known"),
        ({"selection": ("data",)}, "it covers a selection only; run the whole profile"),
        ({"state": "interrupted"}, "it is interrupted; run it to its end"),
    ],
)
def test_what_is_unfit_is_refused(accept, run_of, tmp_path, outcomes, sentence):
    result = accept(run_of(**outcomes))
    assert result.exit_code == ExitCode.USAGE
    assert sentence in result.output
    assert not (tmp_path / "b.json").exists()


def test_a_damaged_or_unfinished_run_is_refused(accept, run_of, tmp_path):
    damaged = run_of()
    (damaged / "report.md").write_text("more")
    assert accept(damaged).exit_code == ExitCode.VERIFICATION_FAILED
    assert accept(run_of(seal=False)).exit_code == ExitCode.INCOMPLETE
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--owner", " "), "--owner ' ': Value error, is empty; expected text."),
        (("--reason", ""), "--reason '': Value error, is empty; expected text."),
        (("--expires", "soon"), "--expires 'soon': Value error, Invalid isoformat"),
        (("--expires", "2020-01-01"), "--expires 2020-01-01 is over; expected a day from"),
    ],
)
def test_nobody_no_reason_and_no_day_are_refused(accept, measured, tmp_path, options, sentence):
    result = accept(measured(), *options)
    assert result.exit_code == ExitCode.USAGE
    assert sentence in result.output
    assert not (tmp_path / "b.json").exists()


def test_what_moves_is_told(accept, measured):
    accept(measured())
    result = accept(measured(cpu="EPYC", gamma="warn"))
    assert "Replaces r1: Integration score 100 (at most 100)" in result.output
    assert "machine class: Linux/x86_64/Xeon/2 -> Linux/x86_64/EPYC/2" in result.output


def test_a_file_of_another_kind_is_not_replaced(accept, measured, tmp_path):
    (tmp_path / "b.json").write_text('{"mine": 1}')
    result = accept(measured())
    assert result.exit_code == ExitCode.USAGE
    assert "exists and is no baseline" in result.output
    assert (tmp_path / "b.json").read_text() == '{"mine": 1}'


def test_the_file_can_be_held_against_its_run(accept, invoke, measured, tmp_path):
    run, file = measured(), tmp_path / "b.json"
    accept(run)
    result = invoke("baseline", "show", file, "--run", run)
    assert result.exit_code == ExitCode.PASS
    assert "It is what the run in" in result.output
    for key, change in (
        ("score", lambda b: b["score"].update(low=70)),
        ("checks", lambda b: b["checks"]["data.alpha"].update(outcome="fail")),
        ("gates", lambda b: b["gates"].update(accuracy=0.5)),
        ("acceptance", lambda b: b["acceptance"].update(run_digest="sha256:0")),
    ):
        accept(run)
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))
        result = invoke("baseline", "show", file, "--run", run)
        assert result.exit_code == ExitCode.VERIFICATION_FAILED, key
        assert f"b.json is not what the run in {run} gives: {key} " in result.output


@pytest.mark.parametrize("command", ["gate", "report", "compare"])
def test_a_file_that_is_no_baseline_is_none(invoke, measured, tmp_path, command):
    file = tmp_path / "b.json"
    for content in ("", "{}", "[1]"):
        file.write_text(content)
        given = (file, measured()) if command == "compare" else (measured(), "--baseline", file)
        result = invoke(command, *given)
        assert result.exit_code == ExitCode.BASELINE_MISSING
        assert "No baseline: " in result.output
        assert content or f"{file} is no baseline: it is empty.\n" in result.output


def test_a_run_directory_has_nobody_to_show(invoke, measured):
    result = invoke("baseline", "show", measured())
    assert result.exit_code == ExitCode.USAGE
    assert "is a run; expected the file of" in result.output
