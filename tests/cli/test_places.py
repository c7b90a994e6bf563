"""A command overwrites nothing that it reads, and puts nothing where nothing else may be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from forge_harness.cli.places import Place, check_apart
from forge_harness.errors import ExitCode, UsageError


@pytest.fixture
def place(tmp_path: Path, invoke, monkeypatch) -> Path:
    """A directory with a keyring, a package, a P-256 key and a state store; the current one."""
    monkeypatch.chdir(tmp_path)
    invoke("keys", "new", "keys.json")
    Path("pkg").mkdir()
    Path("pkg/weights").write_bytes(b"w" * 1000)
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    Path("ec.pem").write_bytes(pem)
    saved = ("--phase", "5", "--kind", "model", "--name", "m", "--root", "states")
    assert invoke("state", "save", "pkg/weights", *saved).exit_code == ExitCode.PASS
    return tmp_path


def everything(place: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file() and path.suffix != ".db-shm"
    }


SIGN = ("sign", "pkg", "--keys", "keys.json")
ISSUE = ("tokens", "issue", "a.db", "--keys", "keys.json", "--name", "a", "--role", "client")
CHECKPOINT = ("state", "checkpoint", "x", "--root", "states", "--keys", "keys.json")
SERVE = ("serve", "--package", "pkg", "--keys", "keys.json", "--tokens", "t.json")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ((*SIGN, "--signature", "keys.json"), "--signature 'keys.json' is the same file as --keys"),
        ((*SIGN, "--public", "./keys.json"), "--public 'keys.json' is the same file as --keys"),
        ((*SIGN, "--public", "linked"), "--public 'linked' is the same file as --keys 'keys.json'"),
        (
            (*SIGN, "--openssf", "ec.pem", "--openssf-key", "ec.pem"),
            "--openssf 'ec.pem' is the same file as --openssf-key",
        ),
        ((*SIGN, "--public", "pkg.dsse.json"), "is the same file as --signature 'pkg.dsse.json'"),
        ((*SIGN, "--public", "pkg/pub.pem"), "--public 'pkg/pub.pem' lies inside DIR 'pkg'"),
        ((*SIGN, "--signature", "pkg/sig"), "--signature 'pkg/sig' lies inside DIR 'pkg'"),
        ((*ISSUE, "--audit", "a.db"), "--audit 'a.db' is the same file as FILE 'a.db'"),
        ((*ISSUE, "--audit", "keys.json"), "--audit 'keys.json' is the same file as --keys"),
        (
            ("tokens", "issue", "l.heads", *ISSUE[3:], "--audit", "l"),
            "the file of heads of --audit 'l.heads' is the same file as FILE 'l.heads'",
        ),
        (
            (*CHECKPOINT, "--audit", "states/objects/log.db"),
            "--audit 'states/objects/log.db' lies inside --root 'states'",
        ),
        ((*CHECKPOINT, "--audit", "keys.json"), "--audit 'keys.json' is the same file as --keys"),
        ((*SERVE, "--audit", "pkg/audit.db"), "--audit 'pkg/audit.db' lies inside --package 'pkg'"),
        ((*SERVE, "--audit", "t.json"), "--audit 't.json' is the same file as --tokens 't.json'"),
    ],
)
def test_a_command_refuses_to_write_over_what_it_needs(place, invoke, command, said) -> None:
    os.link("keys.json", "linked")
    before = everything(place)
    result = invoke(*command)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert said in result.stderr
    assert everything(place) == before


def test_a_store_that_is_to_be_made_is_no_place_for_a_log(place, invoke) -> None:
    """The log made the directory, which was then refused as a store for what lies in it."""
    save = ("state", "save", "pkg/weights", "--phase", "5", "--kind", "model", "--name", "m")
    result = invoke(*save, "--root", "new", "--audit", "new/audit.db", "--keys", "keys.json")
    assert result.exit_code == ExitCode.USAGE, result.output
    assert "--audit 'new/audit.db' lies inside --root 'new'" in result.stderr
    assert not Path("new").exists()
    beside = invoke(*save, "--root", "new", "--audit", "audit.db", "--keys", "keys.json")
    assert beside.exit_code == ExitCode.PASS, beside.output


def test_a_device_may_be_named_twice() -> None:
    null = Path(os.devnull)
    check_apart([Place("--signature", null), Place("--public", null)])


def test_two_names_of_one_new_file_are_one(tmp_path: Path) -> None:
    check_apart([Place("--a", tmp_path / "a")], [Place("--b", tmp_path / "b")])
    with pytest.raises(UsageError, match=r"--a .* is the same file as --b"):
        check_apart([Place("--a", tmp_path / "x" / ".." / "b")], [Place("--b", tmp_path / "b")])
