"""report: the same reports again, and no way to launder a damaged run."""

import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from forge_harness.canonical import canonical_json
from forge_harness.cli.directory_lock import alone_in
from forge_harness.errors import ExitCode
from forge_harness.imports import python_program
from forge_harness.probes.limits import file_size_limited
from forge_harness.report import write as report_module
from forge_harness.rundir import RunDirectory
from forge_harness.scoring import verify_run

FILES = {
    "html": "report.html",
    "json": "report.json",
    "md": "report.md",
    "junit": "junit.xml",
    "ctrf": "ctrf-report.json",
    "sarif": "report.sarif",
}


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


def test_a_full_disk_is_an_error_and_leaves_the_run_as_it_was(invoke, measured):
    run = measured(beta="fail")
    invoke("report", run, "--format", "html,md", "--baseline", measured())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    largest = max(len(content) for path, content in before.items() if path.suffix != ".html")
    # The Markdown still fits, the page does not.
    with file_size_limited(largest):
        result = invoke("report", run, "--format", "md,html,json")
    assert result.exit_code == ExitCode.USAGE
    assert f"No space left for the reports of {run}, which are as they were" in result.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert invoke("verify", run).exit_code == ExitCode.PASS


def test_elsewhere_leaves_the_run_alone(invoke, run_of, tmp_path):
    run = run_of()
    before = sorted(run.rglob("*"))
    result = invoke("report", run, "--format", "html,md", "--out", tmp_path / "public" / "site")
    assert result.exit_code == ExitCode.PASS
    assert (tmp_path / "public" / "site" / "report.html").is_file()
    assert sorted(run.rglob("*")) == before


def test_a_damaged_run_is_given_no_report_and_no_new_manifest(invoke, run_of, tmp_path):
    run = run_of(beta="fail")
    (run / "items.jsonl").write_text("")
    manifest = (run / "manifest.json").read_bytes()
    for where in ([], ["--out", tmp_path / "out"]):
        result = invoke("report", run, *where)
        assert result.exit_code == ExitCode.VERIFICATION_FAILED
        assert f"Refused: {run} does not verify" in result.stderr
    assert (run / "manifest.json").read_bytes() == manifest
    assert verify_run(run)
    assert not (tmp_path / "out").exists()


def test_a_run_whose_report_was_killed_is_mended_by_it(invoke, run_of):
    """SIGKILL, as of a CI job that is over, once pages are written and nothing says so."""
    run = run_of(beta="fail")
    killed = (
        "import os, signal, sys\n"
        "from forge_harness.cli import main\n"
        "from forge_harness.report import provenance\n"
        "provenance.note = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", killed, "report", str(run), "--format", "md,json"]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    (run / ".report.html.1-0123abcd.partial").write_text("half")
    assert verify_run(run)
    for formats, code in (("md", ExitCode.VERIFICATION_FAILED), ("json,md", ExitCode.PASS)):
        result = invoke("report", run, "--format", formats)
        assert result.exit_code == code, result.output
    assert verify_run(run) == []
    assert sorted(path.name for path in run.glob("*report*")) == [
        "report.json",
        "report.md",
        "reports.json",
    ]


def test_a_report_that_is_a_link_is_damage(invoke, run_of, tmp_path):
    run = run_of()
    invoke("report", run, "--format", "md")
    (run / "report.md").rename(tmp_path / "elsewhere")
    (run / "report.md").symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    result = invoke("report", run, "--format", "md", "--baseline", run_of())
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_a_forged_verdict_gets_no_report(invoke, run_of, tmp_path):
    run = run_of(alpha="fail")
    text = (run / "run.json").read_text()
    assert '"FAIL"' in text
    (run / "run.json").write_text(text.replace('"FAIL"', '"PASS"'))
    result = invoke("report", run, "--out", tmp_path / "out")
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["", "public", "artifacts/deeper"])
def test_reports_elsewhere_are_not_within_a_run(invoke, run_of, where):
    run, other = run_of(), run_of()
    for target in (run, other):
        result = invoke("report", run, "--out", target / where, "--format", "json")
        assert result.exit_code == ExitCode.USAGE
        assert "is within a run" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert verify_run(target) == []


def test_a_link_into_the_run_is_within_it(invoke, run_of, tmp_path):
    run = run_of()
    (tmp_path / "link").symlink_to(run)
    result = invoke("report", run, "--out", tmp_path / "link" / "public")
    assert result.exit_code == ExitCode.USAGE
    assert verify_run(run) == []


def test_a_killed_run_is_not_sealed(invoke, run_of, tmp_path):
    run = run_of(seal=False)
    for where in ([], ["--out", tmp_path / "out"]):
        assert invoke("report", run, *where).exit_code == ExitCode.INCOMPLETE
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_reports_and_manifest_costs_no_run(invoke, run_of, monkeypatch, number):
    run = run_of()
    write = report_module.WRITERS["md"][1]

    def interrupted(report):
        os.kill(os.getpid(), number)
        return write(report) + "changed"

    monkeypatch.setitem(report_module.WRITERS, "md", ("report.md", interrupted))
    assert invoke("report", run, "--format", "md").exit_code == ExitCode.PASS
    assert verify_run(run) == []


def test_of_two_that_write_into_a_run_at_once_one_waits(invoke, run_of, monkeypatch, tmp_path):
    """Each would seal what the other is about to replace: the run would not verify any more."""
    run = run_of()
    write = report_module.WRITERS["md"][1]
    free = []

    def other(report):
        held = os.open(run, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free.append(True)
        except BlockingIOError:
            free.append(False)
        finally:
            os.close(held)
        return write(report)

    monkeypatch.setitem(report_module.WRITERS, "md", ("report.md", other))
    assert invoke("report", run, "--format", "md").exit_code == ExitCode.PASS
    assert invoke("report", run, "--format", "md", "--out", tmp_path).exit_code == ExitCode.PASS
    assert free == [False, True]


@pytest.mark.parametrize("command", ["gate", "verify", "explain"])
def test_whoever_reads_a_run_waits_until_its_reports_are_written(run_of, command):
    """Between the first new report and the new manifest a sound run was refused with 8."""
    run = run_of()
    manifest = (run / "manifest.json").read_bytes()
    with alone_in(run):
        (run / "manifest.json").write_bytes(b"{}")
        reader = subprocess.Popen(
            [*python_program("forge_harness"), command, str(run)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        told = reader.stderr.readline()
        (run / "manifest.json").write_bytes(manifest)
    output, more = reader.communicate(timeout=60)
    assert told == (
        f"Waiting: another process reads the run in {run}, or writes reports into it.\n"
    )
    assert (reader.returncode, more) == (ExitCode.PASS, ""), output


def test_a_run_that_is_its_own_baseline_does_not_wait_for_itself(forge, run_of):
    run = run_of()
    assert forge("report", run, "--baseline", run).returncode == ExitCode.PASS


@pytest.mark.parametrize(
    ("started_at", "finished_at", "words"),
    [
        (
            "2026-06-15T12:00:00Z",
            "2026-06-15T12:30:00",
            "finished_at: Value error, '2026-06-15T12:30:00' has no time zone; expected a time "
            "with its zone, such as 2026-01-02T03:04:05Z",
        ),
        ("2026-06-15T12:00:00", None, "started_at: Value error, '2026-06-15T12:00:00' has no"),
        ("noon", None, "started_at: Value error, 'noon' is no time; expected a time with its"),
        ("0001-01-01T00:00:00+14:00", None, "started_at: Value error, '0001-01-01T00:00:00+14:00'"),
    ],
)
@pytest.mark.parametrize("command", ["report", "gate", "explain", "verify"])
def test_times_without_a_zone_are_one_sentence(
    invoke, run_of, command, started_at, finished_at, words
):
    """A record from elsewhere: with one zone of two the report ended in an internal error."""
    run = run_of()
    values = json.loads((run / "run.json").read_bytes())
    values |= {"started_at": started_at, "finished_at": finished_at}
    (run / "run.json").write_bytes(canonical_json(values))
    RunDirectory.open_existing(run).seal()
    result = invoke(command, run)
    assert result.exit_code == ExitCode.VERIFICATION_FAILED
    if command == "verify":
        sentence, _ = result.stderr.splitlines()
        assert sentence.startswith(f"run.json: $.{words.replace(': ', ': expected ', 1)}")
    else:
        (sentence,) = result.stderr.splitlines()
        assert words in sentence
