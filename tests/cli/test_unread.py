"""Commands of which nobody reads a stream: what they found is kept, and decides how they end."""

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
    assert done.returncode == ExitCode.INTERRUPTED, done.stderr
    assert json.loads((tmp_path / "found.json").read_bytes())
