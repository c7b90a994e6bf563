from __future__ import annotations

import base64
import os
import sys
import threading
from pathlib import Path

import pytest

from forge_harness.errors import MissingKeyError, SecurityError
from forge_harness.security.key_sources import (
    followed_keyring,
    keyring_from_command,
    keyring_from_environment,
    keyring_from_file,
    load_keyring,
    write_keyring,
)
from forge_harness.security.keys import Keyring, KeyState, Purpose


def test_one_active_key_a_purpose_and_none_for_two_purposes() -> None:
    keyring = Keyring.new()
    assert len({keyring.active(purpose) for purpose in Purpose}) == len(Purpose)
    assert keyring.usable(keyring.active_id(Purpose.AUDIT), Purpose.SEAL) is None


def test_rotation_keeps_the_former_key_for_reading_and_touches_no_other_purpose() -> None:
    before = Keyring.new()
    after = before.rotated()
    assert after.active() != before.active()
    assert after.usable(before.active_id()) == before.active()
    assert after.active(Purpose.SIGN) == before.active(Purpose.SIGN)
    states = [key.state for key in after.keys if key.purpose is Purpose.SEAL]
    assert states == [KeyState.DECRYPT_ONLY, KeyState.ACTIVE]


def test_destroying_takes_the_bytes_and_leaves_the_id() -> None:
    before = Keyring.new()
    old = before.active_id()
    with pytest.raises(SecurityError, match="is active; only a decrypt-only key"):
        before.destroyed(old)
    after = before.rotated().destroyed(old)
    assert after.usable(old) is None
    assert [k.material for k in after.keys if k.id == old] == [b""]
    assert before.active() not in after.to_bytes()
    with pytest.raises(SecurityError, match="not in the keyring"):
        before.destroyed("00")


def test_a_purpose_without_an_active_key_says_so() -> None:
    with pytest.raises(MissingKeyError, match="no active key to sign"):
        Keyring.new([Purpose.SEAL]).active(Purpose.SIGN)


def test_round_trip() -> None:
    keyring = Keyring.new().rotated().rotated(Purpose.AUDIT)
    keyring = keyring.destroyed(keyring.keys[0].id)
    assert Keyring.from_bytes(keyring.to_bytes()).keys == keyring.keys


def test_no_key_in_representations_and_messages() -> None:
    keyring = Keyring.new()
    secret = base64.b64encode(keyring.active()).decode()
    assert secret not in repr(keyring.keys)
    assert repr(keyring.active()) not in repr(keyring.keys)
    broken = keyring.to_bytes().replace(b'"state":"active"', b'"state":"stolen"', 1)
    for content in (broken, b"", b"[]", b"{}", keyring.to_bytes()[:-20], secret.encode()):
        with pytest.raises(SecurityError, match="keyring cannot be read") as caught:
            Keyring.from_bytes(content)
        assert secret not in str(caught.value)
        assert caught.value.__cause__ is None


def test_json_too_deep_to_read_is_no_keyring() -> None:
    with pytest.raises(SecurityError, match=r"cannot be read \(RecursionError\)"):
        Keyring.from_bytes(b"[" * 100_000)


def test_two_active_keys_of_a_purpose_are_refused() -> None:
    with pytest.raises(SecurityError, match="two active keys"):
        Keyring([*Keyring.new().keys, *Keyring.new().keys])


def test_a_file_is_its_owners_alone(tmp_path: Path) -> None:
    path, keyring = tmp_path / "keys.json", Keyring.new()
    write_keyring(path, keyring)
    assert path.stat().st_mode & 0o777 == 0o600
    assert keyring_from_file(path).keys == keyring.keys
    for mode in (0o640, 0o604, 0o660, 0o644):
        path.chmod(mode)
        with pytest.raises(SecurityError, match=rf"has mode {mode:04o}.*chmod 600"):
            keyring_from_file(path)
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(SecurityError, match="not a link"):
        keyring_from_file(tmp_path / "link")
    with pytest.raises(MissingKeyError, match="keys new"):
        keyring_from_file(tmp_path / "none")
    with pytest.raises(SecurityError, match="regular file"):
        keyring_from_file(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file to another user needs root")
def test_another_users_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write_keyring(path, Keyring.new())
    os.chown(path, 12345, -1)
    with pytest.raises(SecurityError, match="owner 12345"):
        keyring_from_file(path)


def test_a_variable_is_read_once_and_is_gone_for_children() -> None:
    keyring = Keyring.new()
    environ = {"K": base64.b64encode(keyring.to_bytes()).decode(), "OTHER": "1"}
    assert keyring_from_environment("K", environ).keys == keyring.keys
    assert environ == {"OTHER": "1"}
    with pytest.raises(MissingKeyError, match="'K' is not set"):
        keyring_from_environment("K", environ)
    with pytest.raises(SecurityError, match="not base64"):
        load_keyring("env:K", {"K": "%%"})


def test_a_file_that_is_followed_is_read_again_and_kept_while_it_is_gone(tmp_path: Path) -> None:
    path, first = tmp_path / "keys.json", Keyring.new()
    write_keyring(path, first)
    current = followed_keyring(str(path))
    assert current().active_id() == first.active_id()
    write_keyring(path, after := first.rotated())
    assert current().active_id() == after.active_id()
    for harm in (path.unlink, lambda: path.write_bytes(b"{"), lambda: path.chmod(0o644)):
        harm()
        assert current().active_id() == after.active_id()
    path.unlink()
    write_keyring(path, last := after.rotated())
    assert current().active_id() == last.active_id()
    with pytest.raises(MissingKeyError):
        followed_keyring(str(tmp_path / "none"))


def test_a_command_prints_a_keyring(tmp_path: Path) -> None:
    keyring = Keyring.new()
    (tmp_path / "k").write_bytes(keyring.to_bytes())
    code = f"print(open({str(tmp_path / 'k')!r}).read())"
    assert keyring_from_command([sys.executable, "-c", code]).keys == keyring.keys
    assert load_keyring(f"command:cat '{tmp_path / 'k'}'").keys == keyring.keys
    with pytest.raises(MissingKeyError, match="exit code 3"):
        keyring_from_command([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(MissingKeyError, match=r"took over 0\.2 s"):
        keyring_from_command([sys.executable, "-c", "import time; time.sleep(9)"], timeout_s=0.2)
    with pytest.raises(MissingKeyError, match="cannot be started"):
        load_keyring("command:/no/such/program")
    with pytest.raises(MissingKeyError, match="No command"):
        load_keyring("command:")
    with pytest.raises(SecurityError, match="quoted as for a shell") as found:
        load_keyring("command:vault --token 's3cret")
    assert "s3cret" not in str(found.value)
    with pytest.raises(SecurityError, match="keyring cannot be read"):
        load_keyring("command:echo $(id)")  # no shell: the text itself, which is no keyring


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_keyring_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    found = []

    def read():
        try:
            keyring_from_file(tmp_path / "pipe")
        except SecurityError as error:
            found.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(5)
    assert ["is not a regular file" in sentence for sentence in found] == [True]
