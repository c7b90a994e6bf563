"""Commands of which nobody reads a stream: what they found is kept, and decides how they end.

A shell shows the code of `gate ... | head` under `set -o pipefail`, in CI always.
"""

import json
import os
import subprocess
import sys

import pytest

from forge_harness.errors import ExitCode
from forge_harness.security.audit import AuditEvent, AuditLog, Decision
from forge_harness.security.key_sources import write_keyring
from forge_harness.security.keys import Keyring

BENCH = ("--blob-mib", "1", "--states", "10", "--rounds", "6")


@pytest.fixture
def keyring(tmp_path):
    keyring = Keyring.new()
    write_keyring(tmp_path / "keys.json", keyring)
    return keyring


def unread(directory, *words, stream="stderr"):
    """Runs a command of which one stream is a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as nobody:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: nobody}
        return subprocess.run(
            [sys.executable, "-m", "forge_harness", *words],
            cwd=directory,
            text=True,
            check=False,
            timeout=120,
            **streams,
        )


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_a_run_whose_streams_are_closed_runs(tmp_path, closed):
    """A pipe of the harness that took the number of a closed one was the end of its children."""
    words = "run --quiet --check environment.text_encoding --format md --run-dir first"
    command = f"'{sys.executable}' -m forge_harness {words} {closed}"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == ExitCode.PASS, done.stderr
    assert (tmp_path / "first" / "report.md").is_file()
    assert ("Exit code 0" in done.stdout) == (">&-" not in closed)


def test_an_audit_log_that_does_not_verify_is_8(tmp_path, keyring):
    with AuditLog.of_keyring(tmp_path / "audit.db", keyring) as log:
        for name in ("a", "b"):
            log.record(
                AuditEvent(actor="ci", action="state.save", resource=name, decision=Decision.ALLOW)
            )
    (tmp_path / "audit.db.heads").unlink()
    done = unread(tmp_path, "audit", "verify", "audit.db", "--keys", "keys.json")
    assert done.returncode == ExitCode.VERIFICATION_FAILED
    assert "does not verify" in done.stdout


def test_a_token_that_was_issued_is_shown_and_0(tmp_path, keyring):
    words = ("tokens", "issue", "tokens.json", "--keys", "keys.json", "--name", "ci")
    done = unread(tmp_path, *words, "--role", "client")
    assert (done.returncode, done.stdout[:4]) == (ExitCode.PASS, "fht_")


def test_what_was_measured_is_kept_and_0(tmp_path):
    done = unread(tmp_path, "bench", "store", *BENCH, "--dir", ".", "--json", "store.json")
    assert done.returncode == ExitCode.PASS
    assert json.loads((tmp_path / "store.json").read_bytes())["rows"]


@pytest.mark.parametrize(
    "words",
    [
        ("bench", "store", *BENCH, "--dir", "."),
        ("drill", "storage", "--campaign", "newer_schema"),
    ],
)
def test_what_was_measured_is_kept_although_nobody_reads_the_table(tmp_path, words):
    """`bench ... | head` left no file behind, after minutes of measuring."""
    done = unread(tmp_path, *words, "--json", "found.json", stream="stdout")
    assert done.returncode == ExitCode.PASS, done.stderr
    assert json.loads((tmp_path / "found.json").read_bytes())


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    ("outcomes", "words", "code"),
    [
        ({}, ["gate"], ExitCode.PASS),
        ({"beta": "fail"}, ["gate"], ExitCode.GATE_FAILED),
        ({"beta": None}, ["gate"], ExitCode.INCOMPLETE),
        ({"beta": "fail"}, ["explain", "--json"], ExitCode.PASS),
        ({}, ["history", "export"], ExitCode.PASS),  # bytes, not text
    ],
)
def test_a_verdict_stands_although_nobody_reads_it(tmp_path, run_of, outcomes, words, code, stream):
    done = unread(tmp_path, *words, str(run_of(**outcomes)), stream=stream)
    assert done.returncode == code
    assert not done.stderr


def test_differences_that_nobody_reads_are_8(tmp_path, run_of):
    run = run_of()
    (run / "run.json").write_text("{}")
    assert unread(tmp_path, "verify", str(run)).returncode == ExitCode.VERIFICATION_FAILED


@pytest.mark.parametrize("words", [["--help"], ["list", "suites"], ["history", "--help"]])
def test_help_and_lists_that_nobody_reads_are_0(tmp_path, words):
    assert unread(tmp_path, *words, stream="stdout").returncode == ExitCode.PASS


def test_a_wrong_command_that_nobody_reads_is_4(tmp_path):
    assert unread(tmp_path, "lst").returncode == ExitCode.USAGE


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full to write to")
def test_a_full_disk_is_no_reader_that_went_away(tmp_path, run_of):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "forge_harness", "gate", str(run_of())],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.startswith("Error: No space left on device")
