from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from forge_harness.cli import app
from forge_harness.cli.sign import sign_command
from forge_harness.cli.verify import verify_command
from forge_harness.errors import ExitCode, SecurityError, SignatureError, UsageError
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
    assert "1 file signed by key" in sign(package).output
    assert "is what was signed: 1 file," in verify(package).output
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


@pytest.mark.parametrize("name", [".gitattributes", ".github/workflows/ci.yml", ".hidden"])
def test_openssf_verifies_a_package_from_a_hub_as_it_is_told(package: Path, name: str) -> None:
    pytest.importorskip("model_signing", reason="an oracle, in extra dev")
    (package / name).parent.mkdir(parents=True, exist_ok=True)
    (package / name).write_text("*.safetensors filter=lfs")
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    files = {part: package.with_name(part) for part in ("ec.pem", "public.pem", "model.sig")}
    files["ec.pem"].write_bytes(private)
    files["public.pem"].write_bytes(public)
    signed = sign(
        package, "--openssf", str(files["model.sig"]), "--openssf-key", str(files["ec.pem"])
    )
    told = ["--no-ignore-git-paths"] if "--no-ignore-git-paths" in signed.output else []
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(package), *told]
    command += ["--signature", str(files["model.sig"]), "--public_key", str(files["public.pem"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert bool(told) == name.startswith(".git")


def test_another_key_for_openssf_leaves_no_signature(package: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    pem = package.with_name("ec.pem")
    pem.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
    before = set(package.parent.rglob("*"))
    target = str(package.with_name("d.sig"))
    error = sign(package, "--openssf", target, "--openssf-key", str(pem)).exception
    assert isinstance(error, SecurityError)
    assert set(package.parent.rglob("*")) == before


def code_of(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *(str(argument) for argument in arguments)])
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.exit_code, result.stderr


@pytest.mark.parametrize("what", ["link", "pipe", "emptied"])
def test_what_was_done_to_a_signed_package_exits_8(package: Path, what: str) -> None:
    sign(package)
    if what == "link":
        (package / "link").symlink_to("weights")
    elif what == "pipe":
        os.mkfifo(package / "pipe")
    else:
        (package / "weights").unlink()
    code, said = code_of(package, "--key", package.with_name("key.pem"))
    assert code == ExitCode.VERIFICATION_FAILED, said
    assert "is not what was signed" in said


def test_a_package_that_is_not_there_exits_4(package: Path) -> None:
    sign(package)
    key = package.with_name("key.pem")
    for path in (package.with_name("none"), package / "weights"):
        code, said = code_of(path, "--key", key)
        assert code == ExitCode.USAGE, said
        assert "is no directory; expected a package" in said


def test_one_key_twice_is_one_key(package: Path) -> None:
    sign(package)
    key = package.with_name("key.pem")
    code, said = code_of(package, "--key", key, "--key", key, "--threshold", "2")
    assert code == ExitCode.USAGE
    assert "2 signatures are asked for and 1 different key is pinned" in said


@pytest.mark.parametrize("signed", [False, True])
def test_a_package_without_a_key_is_not_called_damaged(package: Path, signed: bool) -> None:
    (package / "manifest.json").write_text('{"schema": "forge-manifest/1", "files": {}}')
    if signed:
        sign(package)
    code, said = code_of(package)
    assert code == ExitCode.USAGE, said
    assert f"{package} is a package, not a run; give --key PEM" in said
