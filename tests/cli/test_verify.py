"""verify: exit 8 naming each difference, 0 with what was recomputed."""

import json

import pytest

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


def test_a_page_of_another_release_is_told_and_not_judged(invoke, run_of):
    path = run_of()
    invoke("report", path, "--format", "md")
    (path / "reports.json").unlink()
    RunDirectory.open_existing(path).seal()
    result = invoke("verify", path)
    assert result.exit_code == ExitCode.PASS
    assert "Not rendered again: report.md, nothing says what made it." in result.output
