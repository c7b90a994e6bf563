"""gate: the exit code CI trusts."""

import json

import pytest

from forge_harness.canonical import canonical_json, file_sha256
from forge_harness.errors import ExitCode
from forge_harness.rundir import RUN, RunDirectory, read_items, read_policy, read_record
from forge_harness.scoring import assemble, context_of, verify_run

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


HOSTILE = "no\r::stop-commands::x\x1b[2J ##[error]y"


@pytest.fixture
def hostile(run_of, make, tmp_path):
    """A run whose failing test says what a terminal or a runner would obey."""
    run = run_of(beta="fail")
    record, policy = read_record(run), read_policy(run)
    items = [i.model_copy(update={"reason": HOSTILE if i.reason else ""}) for i in read_items(run)]
    changed = assemble(policy, items, scope=record.scope, context=context_of(record))
    directory = RunDirectory.open_existing(run)
    (run / "items.jsonl").write_bytes(b"")
    for item in items:
        directory.append_item(item)
    directory.write_final(changed, policy)
    directory.seal()
    return run


def test_what_a_test_says_is_one_line_and_no_command(invoke, hostile, monkeypatch):
    for setting, shown in (("", "##[error]y"), ("true", "## [error]y")):
        monkeypatch.setenv("GITHUB_ACTIONS", setting)
        result = invoke("gate", hostile)
        assert result.exit_code == ExitCode.GATE_FAILED
        assert not {"\r", "\x1b"} & set(result.output)
        reason = next(line for line in result.output.splitlines() if line.startswith("  - "))
        assert reason.endswith(r"failed: no\r::stop-commands::x\x1b[2J " + shown)


@pytest.mark.parametrize("command", ["gate", "explain"])
def test_the_policy_stands_beside_the_score(invoke, run_of, command):
    run = run_of()
    assert (
        f"Policy: {read_record(run).policy_digest}, not the one that ships: "
        in invoke(command, run).output
    )


def test_a_gate_that_fails_shows_an_error_in_github(invoke, run_of, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    partial = run_of(selection=("data",))
    assert "::error title=PARTIAL::only a selection ran" in invoke("gate", partial).output
    accepted = invoke("gate", partial, "--fail-on", "fail")
    assert accepted.exit_code == ExitCode.PASS
    assert "::error" not in accepted.output
    failed = invoke("gate", run_of(selection=("training",), gamma="fail"))
    assert failed.exit_code == ExitCode.GATE_FAILED
    assert "::error title=training.gamma (medium)%3A fail::why fail" in failed.output
    flaky = invoke("gate", run_of(alpha="flaky"))
    assert flaky.exit_code == ExitCode.GATE_FAILED
    assert "::error title=data.alpha (critical)%3A flaky::why flaky" in flaky.output


@pytest.mark.parametrize(
    ("outcomes", "before", "code", "sentence"),
    [
        ({}, {}, ExitCode.PASS, "Not worse than baseline r1."),
        (WARNED, {}, ExitCode.GATE_FAILED, "  - the score fell from 100 to"),
        ({}, WARNED, ExitCode.PASS, "Not worse than baseline r1."),
        (OPEN, WARNED, ExitCode.GATE_FAILED, "  - the score fell from"),
        (FAILED, FAILED, ExitCode.GATE_FAILED, "Not worse than baseline r1."),
    ],
    ids=["same", "worse", "better", "less_measured", "failed_before"],
)
def test_a_run_is_held_against_its_baseline(invoke, measured, outcomes, before, code, sentence):
    result = invoke("gate", measured(**outcomes), "--baseline", measured(**before))
    assert result.exit_code == code
    assert sentence in result.output


def test_what_is_worse_than_the_baseline_is_an_error_in_github(invoke, measured, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    result = invoke("gate", measured(**WARNED), "--baseline", measured())
    assert "::error title=PASS_WITH_WARNINGS::the score fell from 100 to" in result.output


def test_a_run_of_another_machine_is_no_baseline(invoke, measured):
    other = measured(cpu="EPYC")
    result = invoke("gate", measured(), "--baseline", other)
    assert result.exit_code == ExitCode.BASELINE_MISSING
    assert "The baseline r1 does not compare: the machine class is" in result.output
    # A verdict that is not green stays what it is.
    for outcomes, code in ((FAILED, ExitCode.GATE_FAILED), (OPEN, ExitCode.INCOMPLETE)):
        assert invoke("gate", measured(**outcomes), "--baseline", other).exit_code == code


@pytest.mark.parametrize("command", ["gate", "report"])
def test_a_baseline_must_be_a_sound_finished_run(invoke, measured, run_of, tmp_path, command):
    killed, damaged = run_of(seal=False), measured()
    (damaged / "run.json").write_text("{}")
    for baseline, code in (
        (tmp_path / "gone", ExitCode.BASELINE_MISSING),
        (killed, ExitCode.BASELINE_MISSING),
        (damaged, ExitCode.VERIFICATION_FAILED),
    ):
        result = invoke(command, measured(), "--baseline", baseline)
        assert result.exit_code == code, baseline


def test_a_report_shows_what_changed_since_the_baseline(invoke, measured):
    run = measured(**FAILED)
    assert invoke("report", run, "--format", "md", "--baseline", measured()).exit_code == 0
    assert "Newly failing: <code>data.beta</code>" in (run / "report.md").read_text("utf-8")
    assert verify_run(run) == []


def with_page(invoke, run):
    """A run with a page, and its page."""
    assert invoke("report", run, "--format", "md").exit_code == ExitCode.PASS
    return run, run / "report.md"


def edit_page(run, page):
    """Makes the page say another verdict, and the manifest anew."""
    page.write_text(page.read_text(encoding="utf-8").replace("FAIL", "PASS"), encoding="utf-8")
    RunDirectory.open_existing(run).seal()


@pytest.mark.parametrize("note", ["kept", "gone", "twice"])
def test_a_run_whose_page_was_edited_is_refused(invoke, run_of, note):
    run, page = with_page(invoke, run_of(beta="fail"))
    assert invoke("gate", run).exit_code == ExitCode.GATE_FAILED
    if note == "gone":
        (run / "reports.json").unlink()
    elif note == "twice":
        text = (run / "reports.json").read_text()
        (run / "reports.json").write_text('{"files":{},' + text[1:])
    edit_page(run, page)
    result = invoke("gate", run)
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    named = "reports.json: cannot be read" if note == "twice" else "report.md: is not the "
    assert result.stderr.startswith(f"Error: Refused: {run} does not verify: {named}")
    assert "Exit code" not in result.output


def by_another_release(run, page):
    note = json.loads((run / "reports.json").read_bytes())
    note["files"]["report.md"]["renderer"] = "forge-harness 0.0.9"
    (run / "reports.json").write_bytes(canonical_json(note))
    page.write_text(page.read_text(encoding="utf-8") + "drawn otherwise\n", encoding="utf-8")
    RunDirectory.open_existing(run).seal()


@pytest.mark.parametrize(
    ("outcomes", "fail_on", "code", "meaning"),
    [
        (GOOD, "incomplete", ExitCode.INCOMPLETE, "incomplete: a report is not verified"),
        (GOOD, "warn", ExitCode.INCOMPLETE, "incomplete: a report is not verified"),
        (GOOD, "fail", ExitCode.PASS, "pass; reports that are not verified are accepted by "),
        (OPEN, "fail", ExitCode.PASS, "what is missing is not proved; reports that are not "),
        (OPEN, "incomplete", ExitCode.INCOMPLETE, "incomplete: required evidence is missing"),
        (FAILED, "fail", ExitCode.GATE_FAILED, "gate failed"),
    ],
)
def test_a_page_that_cannot_be_verified_is_never_green(
    invoke, run_of, outcomes, fail_on, code, meaning
):
    run, page = with_page(invoke, run_of(**outcomes))
    by_another_release(run, page)
    result = invoke("gate", run, "--fail-on", fail_on)
    assert result.exit_code == code
    assert "Not verified: report.md, made by forge-harness 0.0.9; rendered here" in result.output
    assert meaning in result.output.splitlines()[-1]


def test_a_page_that_cannot_be_verified_is_an_error_in_github(invoke, run_of, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    run, page = with_page(invoke, run_of())
    by_another_release(run, page)
    assert "::error title=PASS::Not verified: report.md" in invoke("gate", run).output


def test_the_policy_can_be_pinned(invoke, run_of):
    run = run_of()
    digest = read_policy(run).digest
    assert invoke("gate", run, "--policy-digest", digest).exit_code == ExitCode.PASS
    other = "sha256:" + "0" * 64
    for outcomes in (GOOD, FAILED):
        run = run_of(**outcomes)
        result = invoke("gate", run, "--policy-digest", other, "--fail-on", "fail")
        assert result.exit_code == ExitCode.VERIFICATION_FAILED
        assert result.stderr == (
            f"Error: Refused: the run in {run} was scored under policy {digest}, not under {other} "
            "(--policy-digest); run it under that policy, or pin this one after a review.\n"
        )
        assert result.stdout == ""


@pytest.mark.parametrize("text", ["", "sha256:", "sha256:b3a0209cb40c", "B3" * 32, "x" * 71])
def test_a_pin_that_is_no_digest_is_a_usage_error(invoke, run_of, text):
    result = invoke("gate", run_of(), "--policy-digest", text)
    assert result.exit_code == ExitCode.USAGE
    assert f"--policy-digest {text!r} is no digest; expected sha256: and 64" in result.stderr


def test_the_digest_of_a_baseline_directory_is_kept_beside_the_page(invoke, measured):
    before, run = measured(), measured(**FAILED)
    invoke("report", run, "--format", "md", "--baseline", before)
    note = json.loads((run / "reports.json").read_bytes())["files"]["report.md"]
    digest = f"sha256:{file_sha256(before / 'run.json')}"
    assert note["baseline"]["run_digest"] == digest
    assert f"  with baseline r1 (run.json {digest}) as reports.json has them: report.md" in (
        invoke("verify", run).output
    )


@pytest.mark.parametrize(
    ("starts", "finishes", "sentence"),
    [
        ("9999-12-31T00:00:00Z", "9999-12-31T00:00:01Z", "started on 9999-12-31T00:00:00Z"),
        ("2026-06-15T12:00:00Z", "2026-06-15T11:59:59Z", "is before started_at"),
    ],
)
def test_times_that_cannot_be_are_refused(invoke, run_of, starts, finishes, sentence):
    """The day of the start decides whether a waiver is live; in the year 9999 none was judged."""
    path = run_of()
    record = json.loads((path / RUN).read_bytes())
    record |= {"started_at": starts, "finished_at": finishes}
    (path / RUN).write_bytes(canonical_json(record))
    RunDirectory.open_existing(path).seal()
    result = invoke("gate", path)
    assert result.exit_code == 8
    assert sentence in result.stderr
