"""report: the same reports again, and no way to launder a damaged run."""

import pytest

from forge_harness.errors import ExitCode
from forge_harness.scoring import verify_run

FILES = {"html": "report.html", "json": "report.json", "md": "report.md", "junit": "junit.xml"}


@pytest.mark.parametrize("format", FILES)
def test_each_format_is_written_into_the_run_which_still_verifies(invoke, run_of, format):
    run = run_of(beta="fail")
    result = invoke("report", run, "--format", format)
    assert result.exit_code == ExitCode.PASS
    assert result.output == f"{run / FILES[format]}\n"
    assert (run / FILES[format]).stat().st_size > 0
    assert verify_run(run) == []


def test_writing_again_changes_nothing(invoke, run_of):
    run = run_of()
    formats = ",".join(FILES)
    invoke("report", run, "--format", formats)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert invoke("report", run, "--format", formats).exit_code == ExitCode.PASS
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_elsewhere_leaves_the_run_alone(invoke, run_of, tmp_path):
    run = run_of()
    before = sorted(run.rglob("*"))
    result = invoke("report", run, "--format", "html,md", "--out", tmp_path / "public" / "site")
    assert result.exit_code == ExitCode.PASS
    assert (tmp_path / "public" / "site" / "report.html").is_file()
    assert sorted(run.rglob("*")) == before


def test_a_damaged_run_is_not_given_a_new_manifest(invoke, run_of, tmp_path):
    run = run_of(beta="fail")
    (run / "items.jsonl").write_text("")
    manifest = (run / "manifest.json").read_bytes()
    result = invoke("report", run)
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    assert "a new manifest would hide that" in result.stderr
    assert (run / "manifest.json").read_bytes() == manifest
    assert verify_run(run)
    assert invoke("report", run, "--out", tmp_path / "out").exit_code == ExitCode.PASS


def test_a_killed_run_is_not_sealed(invoke, run_of):
    run = run_of(seal=False)
    assert invoke("report", run).exit_code == ExitCode.VERIFICATION_FAILED
    assert not (run / "manifest.json").exists()


def test_report_never_gates(invoke, run_of):
    assert invoke("report", run_of(alpha="fail")).exit_code == ExitCode.PASS


def test_formats_are_checked(invoke, run_of):
    result = invoke("report", run_of(), "--format", "html,pdf")
    assert result.exit_code == ExitCode.USAGE
    assert "Unknown report format 'pdf'." in result.stderr


def test_a_place_that_cannot_be_written_is_one_sentence(invoke, run_of, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("report", run_of(), "--out", tmp_path / "file" / "deeper")
    assert result.exit_code == ExitCode.USAGE
    assert "Cannot make" in result.stderr
