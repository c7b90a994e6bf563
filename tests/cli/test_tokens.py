"""tokens, and serve with them: what is wrong with a file is a usage error, said first."""

from __future__ import annotations

import json
import os

import pytest

from forge_harness.errors import ExitCode


@pytest.fixture
def keys(tmp_path, invoke):
    assert invoke("keys", "new", tmp_path / "keys.json").exit_code == ExitCode.PASS
    return ("--keys", tmp_path / "keys.json")


def issue(invoke, keys, path, *more, name="ci"):
    return invoke("tokens", "issue", path, *keys, "--name", name, "--role", "client", *more)


def test_issued_listed_revoked(invoke, keys, tmp_path):
    path = tmp_path / "tokens.json"
    assert issue(invoke, keys, path).stdout.startswith("fht_")
    (row,) = json.loads(invoke("tokens", "list", path, *keys, "--json").stdout)
    assert row["name"] == "ci"
    assert "revoked on" in invoke("tokens", "revoke", path, row["id"], *keys).stdout


@pytest.mark.parametrize("arguments", [("list",), ("revoke",)])
def test_a_file_that_is_not_there_is_not_an_empty_one(invoke, keys, tmp_path, arguments):
    path = tmp_path / "deeper" / "nope"
    more = ("0123456789abcdef",) if arguments == ("revoke",) else ()
    result = invoke("tokens", *arguments, path, *more, *keys)
    assert result.exit_code == ExitCode.USAGE
    assert (
        f"There is no token file {path}; `forge-harness tokens issue` makes one." in result.stderr
    )
    assert result.stdout == ""
    assert not path.parent.exists()


@pytest.mark.parametrize("name", ["", "  ", "\t", "ci\n     9  admin", "\x1b[2J"])
def test_a_token_is_somebodys(invoke, keys, tmp_path, name):
    result = issue(invoke, keys, tmp_path / "tokens.json", name=name)
    assert result.exit_code == ExitCode.USAGE
    assert "--name" in result.stderr
    assert not (tmp_path / "tokens.json").exists()


def test_an_audit_log_that_is_a_directory_is_a_usage_error(invoke, keys, tmp_path):
    (tmp_path / "logs").mkdir()
    result = issue(invoke, keys, tmp_path / "tokens.json", "--audit", tmp_path / "logs")
    assert result.exit_code == ExitCode.USAGE, result.stderr
    assert "logs" in result.stderr
    assert not (tmp_path / "tokens.json").exists()


@pytest.mark.parametrize("content", ["-----BEGIN PUBLIC KEY-----", "", "[]", '{"schema": "x"}'])
def test_serve_refuses_what_is_no_token_file_before_it_is_ready(invoke, keys, tmp_path, content):
    (tmp_path / "pub.pem").write_text(content)
    package = tmp_path / "package"
    result = invoke("serve", "--package", package, *keys, "--tokens", tmp_path / "pub.pem")
    assert result.exit_code == ExitCode.USAGE
    assert "pub.pem' cannot be read" in result.stderr
    assert result.stdout == ""


def recorded(invoke, log):
    if not log.exists():
        return []
    shown = invoke("audit", "tail", log, "--json")
    assert shown.exit_code == ExitCode.PASS, shown.stderr
    return json.loads(shown.stdout)


def test_the_audit_log_names_the_token_that_was_issued_and_revoked(invoke, keys, tmp_path):
    path, log = tmp_path / "tokens.json", tmp_path / "audit.db"
    assert issue(invoke, keys, path, "--audit", log).exit_code == ExitCode.PASS
    (row,) = json.loads(invoke("tokens", "list", path, *keys, "--json").stdout)
    invoke("tokens", "revoke", path, row["id"], *keys, "--audit", log)
    issued, revoked = recorded(invoke, log)
    assert issued["action"] == "token.issue"
    assert issued["detail"] == {"id": row["id"], "name": "ci", "roles": ["client"], "days": 30.0}
    assert (revoked["action"], revoked["detail"]) == ("token.revoke", {"id": row["id"]})


def test_what_is_refused_is_not_recorded_as_done(invoke, keys, tmp_path):
    path, log = tmp_path / "tokens.json", tmp_path / "audit.db"
    refused = issue(invoke, keys, path, "--role", "root", "--audit", log)
    assert (refused.exit_code, path.exists()) == (ExitCode.USAGE, False)
    assert recorded(invoke, log) == []
    issue(invoke, keys, path)
    unknown = invoke("tokens", "revoke", path, "0" * 16, *keys, "--audit", log)
    assert unknown.exit_code == ExitCode.USAGE
    assert recorded(invoke, log) == []


def test_what_is_no_plain_file_is_refused_and_gets_no_lock_beside_it(invoke, keys, tmp_path):
    (tmp_path / "null").symlink_to(os.devnull)
    (tmp_path / "folder").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, said in (("null", "null' is no plain file"), ("folder", "folder: Is a directory")):
        result = issue(invoke, keys, tmp_path / name)
        assert result.exit_code == ExitCode.USAGE, result.output
        assert said in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
