from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from forge_harness.cli import app
from forge_harness.cli.audit import audit_group
from forge_harness.errors import AuditError, ExitCode
from forge_harness.security.audit import AuditEvent, AuditLog, Decision
from forge_harness.security.key_sources import write_keyring
from forge_harness.security.keys import Keyring, Purpose


@pytest.fixture
def log(tmp_path: Path) -> Path:
    keyring = Keyring.new()
    write_keyring(tmp_path / "keys.json", keyring)
    path = tmp_path / "audit.db"
    keys = {"key": keyring.active(Purpose.AUDIT), "signing_key": keyring.active(Purpose.SIGN)}
    with AuditLog(path, **keys) as log:
        for number in range(3):
            resource = f"phase5/m{number}"
            log.record(
                AuditEvent(
                    actor="ci", action="state.save", resource=resource, decision=Decision.ALLOW
                )
            )
    # A rotation of the signing key leaves the old heads valid.
    write_keyring(tmp_path / "keys.json", keyring.rotated(Purpose.SIGN))
    return path


def run(log: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        audit_group, [arguments[0], str(log), *arguments[1:]], standalone_mode=False
    )


def test_tail_shows_the_newest_oldest_first(log: Path) -> None:
    shown = json.loads(run(log, "tail", "--count", "2", "--json").output)
    assert [record["resource"] for record in shown] == ["phase5/m1", "phase5/m2"]
    assert "state.save" in run(log, "tail").output


def test_verify_names_what_is_wrong_and_exits_8(log: Path) -> None:
    keys = ["--keys", str(log.with_name("keys.json"))]
    good = run(log, "verify", *keys)
    assert (good.return_value, "3 records, 3 signed heads" in good.output) == (0, True)
    heads = log.with_name("audit.db.heads")
    lines = heads.read_bytes().splitlines(keepends=True)
    witness = log.with_name("witness.json")
    witness.write_bytes(lines[-1])
    assert run(log, "verify", *keys, "--newest", str(witness)).return_value == 0
    heads.write_bytes(lines[0] + lines[2])
    bad = run(log, "verify", *keys, "--json")
    assert bad.return_value == 8
    assert json.loads(bad.output)["problems"] == ["Head 2 does not follow the one before it."]


def test_a_log_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    result = run(tmp_path / "none.db", "tail")
    assert isinstance(result.exception, AuditError)
    assert not (tmp_path / "none.db").exists()


def code_of(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.stderr
    return result.exit_code, result.stderr


@pytest.mark.parametrize("what", ["missing", "text", "empty", "directory", "database"])
@pytest.mark.parametrize("command", ["tail", "verify"])
def test_what_is_no_log_is_a_usage_error(log: Path, what: str, command: str) -> None:
    path = log.with_name("other")
    if what == "text":
        path.write_text("no database, long enough to be looked at" * 20)
    elif what == "empty":
        path.write_text("")
    elif what == "directory":
        path.mkdir()
    elif what == "database":
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE t (x)")
        connection.commit()
        connection.close()
    keys = ["--keys", log.with_name("keys.json")] if command == "verify" else []
    code, said = code_of("audit", command, path, *keys)
    assert code == ExitCode.USAGE, said
    assert str(path) in said
    assert ("there is no such file" in said) == (what == "missing")
    assert ("it is no file" in said) == (what == "directory")


def test_a_pipe_is_no_log_and_is_not_waited_for(log: Path) -> None:
    pipe = log.with_name("pipe.db")
    os.mkfifo(pipe)
    tokens = ("tokens", "issue", log.with_name("t.json"), "--name", "ci", "--role", "client")
    code, said = code_of(*tokens, "--keys", log.with_name("keys.json"), "--audit", pipe)
    assert code == ExitCode.USAGE, said
    assert "pipe.db" in said


@pytest.mark.parametrize("option", ["--heads", "--newest"])
def test_a_pipe_is_no_file_of_heads_and_is_not_waited_for(log: Path, option: str) -> None:
    pipe = log.with_name("pipe")
    os.mkfifo(pipe)
    code, said = code_of("audit", "verify", log, "--keys", log.with_name("keys.json"), option, pipe)
    assert code == ExitCode.USAGE, said
    assert str(pipe) in said


def test_more_records_than_there_can_be_are_a_usage_error(log: Path) -> None:
    assert code_of("audit", "tail", log, "--count", str(10**30))[0] == ExitCode.USAGE


@pytest.mark.parametrize("command", ["tail", "verify"])
def test_a_log_cut_off_anywhere_is_damage(log: Path, command: str) -> None:
    with closing(sqlite3.connect(log)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = log.read_bytes()
    keys = ["--keys", log.with_name("keys.json")] if command == "verify" else []
    for length in (*range(0, len(content), 1000), 50, 4096, 8192):
        log.write_bytes(content[:length])
        code, said = code_of("audit", command, log, *keys)
        assert code == ExitCode.VERIFICATION_FAILED, (length, said)
    log.write_bytes(content)
    assert code_of("audit", command, log, *keys)[0] == ExitCode.PASS


def test_a_log_overwritten_in_the_middle_is_damage(log: Path) -> None:
    content = bytearray(log.read_bytes())
    content[4096:] = b"x" * (len(content) - 4096)
    log.write_bytes(content)
    keys = ["--keys", log.with_name("keys.json")]
    assert code_of("audit", "verify", log, *keys)[0] == ExitCode.VERIFICATION_FAILED


@pytest.mark.parametrize("content", [b"", b"garbage", b"[]", b'{"number": 1}', b"\xff\xfe"])
def test_a_newest_head_that_is_none_is_a_usage_error(log: Path, content: bytes) -> None:
    head = log.with_name("head.json")
    head.write_bytes(content)
    keys = ["--keys", log.with_name("keys.json")]
    code, said = code_of("audit", "verify", log, *keys, "--newest", head)
    assert code == ExitCode.USAGE, said
    assert str(head) in said
    assert code_of("audit", "verify", log, *keys, "--newest", log.parent)[0] == ExitCode.USAGE
    assert code_of("audit", "verify", log, *keys, "--heads", log.parent)[0] == ExitCode.USAGE
