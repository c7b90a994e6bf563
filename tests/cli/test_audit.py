from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from forge_harness.cli.audit import audit_group
from forge_harness.errors import AuditError
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
