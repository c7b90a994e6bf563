from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from forge_harness.cli.sign import sign_command
from forge_harness.cli.verify import verify_command
from forge_harness.errors import SignatureError, UsageError
from forge_harness.security.key_sources import write_keyring
from forge_harness.security.keys import Keyring


@pytest.fixture
def package(tmp_path: Path) -> Path:
    write_keyring(tmp_path / "keys.json", Keyring.new())
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "weights").write_bytes(b"w" * 1000)
    return tmp_path / "package"


def sign(package: Path, *more: str) -> Result:
    keys = ["--keys", str(package.with_name("keys.json"))]
    arguments = [str(package), *keys, "--public", str(package.with_name("key.pem")), *more]
    return CliRunner().invoke(sign_command, arguments, standalone_mode=False)


def verify(package: Path, *more: str) -> Result:
    key = ["--key", str(package.with_name("key.pem"))]
    return CliRunner().invoke(verify_command, [str(package), *key, *more], standalone_mode=False)


def test_signed_and_verified(package: Path) -> None:
    assert "1 files signed by key" in sign(package).output
    assert "is what was signed: 1 files" in verify(package).output
    assert json.loads(verify(package, "--json").output)["verified"] is True


def test_a_changed_file_exits_8(package: Path) -> None:
    sign(package)
    (package / "weights").write_bytes(b"v" * 1000)
    error = verify(package).exception
    assert isinstance(error, SignatureError)
    assert error.exit_code == 8
    assert "'weights' is changed" in str(error)


def test_options_that_belong_together(package: Path) -> None:
    assert isinstance(sign(package, "--openssf", "x").exception, UsageError)
    arguments = [str(package), "--threshold", "2"]
    alone = CliRunner().invoke(verify_command, arguments, standalone_mode=False)
    assert "go with --key" in str(alone.exception)
