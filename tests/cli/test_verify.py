"""verify: exit 8 naming each difference, 0 with what was recomputed."""

import json

import pytest

from forge_harness.canonical import canonical_json
from forge_harness.errors import ExitCode
from forge_harness.rundir import RunDirectory


def test_a_sound_run_says_what_was_recomputed(invoke, run_of):
    run = run_of(beta="fail")
    result = invoke("verify", run)
    assert result.exit_code == ExitCode.PASS
    assert f"{run} verifies. Recomputed:" in result.output
    assert "3 files: size and sha256 against the manifest" in result.output
    assert "4 checks rolled up, 2 suites scored" in result.output
    assert "4 values against their limits, 4 test items" in result.output
    assert "verdict FAIL, policy sha256:" in result.output


@pytest.mark.parametrize("name", ["run.json", "policy.json", "items.jsonl", "manifest.json"])
def test_any_flipped_byte_is_found_and_its_file_named(invoke, run_of, name):
    run = run_of()
    size = (run / name).stat().st_size
    for position in {0, size // 3, size // 2, size - 1}:
        data = bytearray((run / name).read_bytes())
        data[position] ^= 1
        (run / name).write_bytes(data)
        result = invoke("verify", run)
        assert result.exit_code == ExitCode.VERIFICATION_FAILED, position
        assert name in result.stderr
        data[position] ^= 1
        (run / name).write_bytes(data)
    assert invoke("verify", run).exit_code == ExitCode.PASS


@pytest.mark.parametrize("command", ["verify", "gate", "report"])
def test_a_name_in_a_run_is_shown_and_not_obeyed(invoke, run_of, command):
    """Whoever can write into a run must not command a CI job, or print a line of praise."""
    run = run_of()
    (run / "x\n::stop-commands::y\r\x1b[2K##[group]it verifies.").write_text("")
    (run / "::stop-commands::y").write_text("")
    result = invoke(command, run)
    assert ": :stop-commands::y: is not in the manifest" in result.stderr
    assert not any(line.lstrip().startswith("::") for line in result.stderr.splitlines())
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    assert r"x\n::stop-commands::y\r\x1b[2K## [group]it verifies.: is not in" in result.stderr


@pytest.mark.parametrize("command", ["verify", "gate", "report"])
def test_so_is_a_key_of_its_record(invoke, run_of, command):
    run = run_of()
    record = json.loads((run / "run.json").read_bytes())
    (run / "run.json").write_bytes(canonical_json({**record, "x\n::stop-commands::y": 1}))
    result = invoke(command, run)
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    assert "\n::" not in result.stderr
    assert r"x\n::stop-commands::y" in result.stderr


def test_a_damaged_record_is_damage_not_usage(invoke, run_of):
    run = run_of()
    (run / "run.json").write_bytes(b"\xff\x00 not json")
    result = invoke("verify", run)
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    (run / "run.json").unlink()
    assert invoke("verify", run).exit_code == ExitCode.VERIFICATION_FAILED


def test_a_killed_run_never_verifies(invoke, run_of):
    result = invoke("verify", run_of(seal=False))
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    assert "the run was not finished" in result.stderr


def test_json_lists_every_problem(invoke, run_of):
    run = run_of()
    assert json.loads(invoke("verify", run, "--json").output)["verified"] is True
    for number in range(30):
        (run / f"extra{number}").write_text("x")
    result = invoke("verify", run, "--json")
    document = json.loads(result.output)
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    assert document["verified"] is False
    assert {problem["file"] for problem in document["problems"]} == {f"extra{n}" for n in range(30)}
    plain = invoke("verify", run)
    assert "and 10 more (--json lists all)" in plain.stderr
    assert "does not verify: 30 differences." in plain.stderr


def test_a_page_that_is_not_of_the_run_does_not_verify(invoke, run_of):
    path = run_of(beta="fail")
    assert invoke("report", path, "--format", "html,md").exit_code == ExitCode.PASS
    result = invoke("verify", path)
    assert "report.html, report.md: rendered again, byte for byte" in result.output
    page = (path / "report.html").read_text(encoding="utf-8")
    (path / "report.html").write_text(page.replace("FAIL", "PASS"), encoding="utf-8")
    RunDirectory.open_existing(path).seal()
    result = invoke("verify", path)
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    assert "report.html: is not the report of this run" in result.output
    told = json.loads(invoke("verify", path, "--json").output)
    assert (told["verified"], told["reports"]["report.md"]) == (False, "rendered again")


def edit_page(path):
    """Makes the page say another verdict, and the manifest anew."""
    page = (path / "report.md").read_text(encoding="utf-8")
    assert "FAIL" in page
    (path / "report.md").write_text(page.replace("FAIL", "PASS"), encoding="utf-8")
    RunDirectory.open_existing(path).seal()


def test_an_edited_page_does_not_verify_without_what_rendered_it(invoke, run_of):
    path = run_of(beta="fail")
    invoke("report", path, "--format", "md")
    (path / "reports.json").unlink()
    RunDirectory.open_existing(path).seal()
    assert "report.md: rendered again, byte for byte" in invoke("verify", path).output
    edit_page(path)
    result = invoke("verify", path)
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    assert "report.md: is not the plain report of this run" in result.stderr


def test_a_page_of_another_release_is_not_verified(invoke, run_of):
    path = run_of(beta="fail")
    invoke("report", path, "--format", "md,junit")
    note = json.loads((path / "reports.json").read_bytes())
    note["files"]["report.md"]["renderer"] = "forge-harness 0.0.9"
    (path / "reports.json").write_bytes(canonical_json(note))
    edit_page(path)
    result = invoke("verify", path)
    assert result.exit_code == ExitCode.INCOMPLETE
    assert f"{path} verifies but for 1 report. Recomputed:" in result.output
    assert "  junit.xml: rendered again, byte for byte" in result.output
    sentence = "Not verified: report.md, made by forge-harness 0.0.9; rendered here it has other"
    assert sentence in result.output
    assert result.output.endswith("Exit code 7: incomplete: a report is not verified.\n")
    told = json.loads(invoke("verify", path, "--json").output)
    assert (told["verified"], told["problems"]) == (False, [])
    assert told["reports"]["report.md"] == "not verified: made by forge-harness 0.0.9"
    # The remedy it names.
    assert invoke("report", path, "--format", "md").exit_code == ExitCode.PASS
    assert invoke("verify", path).exit_code == ExitCode.PASS


def test_study_and_logs_are_recomputed_from_the_record(invoke, run_of):
    path = run_of(left={"study.json": "[]", "logs/pytest.log": "1 passed"})
    result = invoke("verify", path)
    assert result.exit_code == ExitCode.PASS
    assert "  2 files of study and logs: sha256 against run.json" in result.output
    assert "manifest only" not in result.output
    (path / "study.json").write_text("[1]")
    RunDirectory.open_existing(path).seal()
    result = invoke("verify", path)
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    assert "study.json: is not what run.json says: expected sha256:" in result.stderr


def test_what_only_the_manifest_speaks_for_is_said(invoke, run_of):
    path = run_of(left={"study.json": "[]", "logs/pytest.log": "1 passed"})
    record = json.loads((path / "run.json").read_bytes())
    del record["files"]
    (path / "run.json").write_bytes(canonical_json(record))
    RunDirectory.open_existing(path).seal()
    result = invoke("verify", path)
    assert result.exit_code == ExitCode.PASS
    held = "Held against the manifest only, which anybody can write anew"
    assert f"{held}: 2 files (logs/pytest.log, study.json)." in result.output
    told = json.loads(invoke("verify", path, "--json").output)
    assert told["manifest_only"] == ["logs/pytest.log", "study.json"]
    for number in range(6):
        (path / f"note{number}").write_text("x")
    RunDirectory.open_existing(path).seal()
    assert "8 files (logs/pytest.log, note0, note1, note2, note3, ...)." in (
        invoke("verify", path).output
    )


def test_one_of_a_thing_is_named_as_one(invoke, run_of):
    path = run_of(artifacts={"alpha": b"raw samples"}, beta="fail")
    assert "  1 artifact: content against the name" in invoke("verify", path).output
    path = run_of(checks=(("data.alpha", "high"),), left={"logs/pytest.log": "x"})
    output = invoke("verify", path).output
    for line in (
        "0 artifacts: content",
        "1 file of study and logs: ",
        "1 value against their limits, 1 test item",
        "1 check rolled up, 1 suite scored",
    ):
        assert line in output
