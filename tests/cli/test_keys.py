from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from forge_harness import StateManager
from forge_harness.cli.keys import PURPOSES, keys_group
from forge_harness.cli.options import sealer_of
from forge_harness.cli.state import state_group
from forge_harness.errors import ForgeError, MissingKeyError
from forge_harness.rundir import check_manifest
from forge_harness.security import envelope
from forge_harness.security.key_sources import create_keyring, keyring_from_file
from forge_harness.security.keys import Keyring, Purpose
from forge_harness.security.sealing import KeyringSealer, key_ids

from ..privileges import unprivileged


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    assert run("new", str(tmp_path / "keys.json")).return_value == 0
    return tmp_path / "keys.json"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(keys_group, list(arguments), standalone_mode=False)


def test_a_keyring_is_never_written_over(keys: Path) -> None:
    before = keys.read_bytes()
    again = run("new", str(keys))
    assert isinstance(again.exception, ForgeError)
    assert "could never be read again" in str(again.exception)
    assert keys.read_bytes() == before
    assert keys.stat().st_mode & 0o777 == 0o600


def test_a_keyring_is_no_part_of_a_run_and_lies_below_no_file(
    tmp_path: Path, run_of: Callable[..., Path]
) -> None:
    made = run_of()
    within = run("new", str(made / "keys.json"))
    assert "is within a run" in str(within.exception)
    assert check_manifest(made) == []
    (tmp_path / "file").touch()
    below = run("new", str(tmp_path / "file" / "keys.json"))
    assert isinstance(below.exception, NotADirectoryError)
    assert below.exception.filename == str(tmp_path / "file")


def test_listing_shows_every_key_and_no_bytes_of_one(keys: Path) -> None:
    listed = json.loads(run("list", str(keys), "--json").output)
    assert [key["purpose"] for key in listed] == list(PURPOSES) == [str(p) for p in Purpose]
    material = [key["material"] for key in json.loads(keys.read_bytes())["keys"]]
    text = run("list", str(keys)).output + run("list", f"command:cat {keys}").output
    assert not any(secret in text for secret in material)


def test_a_store_and_a_file_follow_a_rotation(keys: Path, tmp_path: Path) -> None:
    keyring = keyring_from_file(keys)
    sealer = KeyringSealer(keyring)
    with StateManager(tmp_path / "states", sealer=sealer) as manager:
        manager.save(phase=5, kind="model", name="m", data=b"m" * 100_000)
    (tmp_path / "f").write_bytes(sealer.seal_bytes(b"content"))
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "g").write_bytes(sealer.seal_bytes(b"content"))
    (tmp_path / "directory" / "plain").write_bytes(b"plain")
    places = [str(tmp_path / name) for name in ("states", "f", "directory")]
    done = run("rotate", str(keys), *(part for place in places for part in ("--sealed", place)))
    assert done.return_value == 0
    assert done.output.count("1 of 1 sealed contents put under it") == 3
    fresh = keyring_from_file(keys)
    assert key_ids(tmp_path / "f") == (fresh.active_id(),)
    assert run("destroy", str(keys), keyring.active_id()).return_value == 0
    verify = ["verify", "--root", str(tmp_path / "states"), "--keys", str(keys)]
    result = CliRunner().invoke(state_group, verify, standalone_mode=False)
    assert (result.return_value, "nothing is wrong" in result.output) == (0, True)


def test_what_runs_for_hours_follows_a_rotation(keys: Path) -> None:
    """A training went on to seal under the former key, and lost it all when that was destroyed."""
    sealer = sealer_of(str(keys))
    assert run("rotate", str(keys)).return_value == 0
    active = keyring_from_file(keys).active_id()
    assert envelope.Head.parse(sealer.seal_bytes(b"content")[: sealer.head_bytes]).key_ids() == (
        active,
    )


def test_what_is_lost_keeps_nothing_else_under_the_old_key(keys: Path, tmp_path: Path) -> None:
    """The first damaged file ended the rotation; what came after it stayed behind."""
    sealer = KeyringSealer(keyring_from_file(keys))
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        for name in ("1", "2", "3"):
            (tmp_path / place / name).write_bytes(sealer.seal_bytes(b"content"))
    damaged = tmp_path / "a" / "2"
    damaged.write_bytes(damaged.read_bytes()[:50])
    places = (part for place in "ab" for part in ("--sealed", str(tmp_path / place)))
    done = run("rotate", str(keys), *places)
    assert isinstance(done.exception, ForgeError)
    assert f"1 file or directory of {tmp_path / 'a'} could not" in str(done.exception)
    assert str(damaged) in str(done.exception)
    assert f"{tmp_path / 'b'}: 3 of 3 sealed contents put under it" in done.output
    fresh = (keyring_from_file(keys).active_id(),)
    sound = [tmp_path / place / name for place in "ab" for name in "123"]
    assert {key_ids(path) for path in sound if path != damaged} == {fresh}


def test_what_cannot_be_listed_is_not_passed_over(keys: Path, tmp_path: Path) -> None:
    """What was sealed in it stayed under the old key, and the command said that all was well."""
    sealer = KeyringSealer(keyring_from_file(keys))
    shut = tmp_path / "sealed" / "shut"
    shut.mkdir(parents=True)
    for path in (shut / "a", tmp_path / "sealed" / "b"):
        path.write_bytes(sealer.seal_bytes(b"content"))
    shut.chmod(0o100)
    command = [sys.executable, "-m", "forge_harness", "keys", "rotate", str(keys), "--sealed"]
    done = subprocess.run(
        [*unprivileged(), *command, str(tmp_path / "sealed")],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    shut.chmod(0o700)
    assert done.returncode != 0
    assert f"1 file or directory of {tmp_path / 'sealed'} could not" in done.stderr
    assert f"the first is {shut}: Permission denied" in done.stderr
    assert key_ids(tmp_path / "sealed" / "b") == (keyring_from_file(keys).active_id(),)


def test_a_rotation_of_token_keys_says_when_a_server_knows_them(keys: Path) -> None:
    assert "is started again" in run("rotate", str(keys), "--purpose", "tokens").stderr
    assert "is started again" not in run("rotate", str(keys)).stderr


def test_wrong_uses(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"plain")
    nothing = run("rotate", str(keys), "--sealed", str(tmp_path / "plain"))
    assert "holds nothing that is sealed" in str(nothing.exception)
    mixed = run("rotate", str(keys), "--purpose", "sign", "--sealed", str(tmp_path / "plain"))
    assert "goes with --purpose seal" in str(mixed.exception)
    assert isinstance(run("rotate", str(tmp_path / "none")).exception, MissingKeyError)
    active = keyring_from_file(keys).active_id()
    assert "is active" in str(run("destroy", str(keys), active).exception)


ROTATE = """
import sys
from forge_harness.cli.keys import keys_group
from forge_harness.errors import MissingKeyError
for _ in range(8):
    keys_group(["rotate", sys.argv[1], "--sealed", sys.argv[2]], standalone_mode=False)
"""


def test_rotations_side_by_side_lose_no_key(keys: Path, tmp_path: Path) -> None:
    keyring, sealed = keyring_from_file(keys), tmp_path / "sealed"
    sealed.write_bytes(KeyringSealer(keyring).seal_bytes(b"content"))
    command = [sys.executable, "-c", ROTATE, str(keys), str(sealed)]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    rotated = keyring_from_file(keys)
    assert len(rotated.usable_ids()) == 1 + 16
    assert set(key_ids(sealed)) == {rotated.active_id()}


def test_of_two_new_keyrings_of_one_name_one_is_made(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "keys.json"
    create_keyring(path, first := Keyring.new())
    with pytest.raises(FileExistsError):
        create_keyring(path, Keyring.new())
    assert keyring_from_file(path).active_id() == first.active_id()


def test_a_keyring_that_cannot_be_written_leaves_no_name(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("forge_harness.security.key_sources.write_durably", refuse)
    with pytest.raises(OSError, match="No space"):
        create_keyring(tmp_path / "keys.json", Keyring.new())
    assert list(tmp_path.iterdir()) == []
