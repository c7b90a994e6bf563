from __future__ import annotations

import json
import os
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.durable import read_plain
from forge_harness.errors import SecurityError, TokenError
from forge_harness.security.access import Principal
from forge_harness.security.keys import Keyring, Purpose
from forge_harness.security.tokens import TokenStore

KEY = bytes(range(32))


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path / "tokens.json", key=KEY)


def test_a_token_lets_its_holder_in_and_is_kept_nowhere(store: TokenStore) -> None:
    secret, token = store.issue("ci", ["client", "viewer"], audience="serve")
    assert store.authenticate(secret, audience="serve") == Principal(
        "ci", frozenset({"client", "viewer"})
    )
    content = store.path.read_text()
    assert secret not in content
    assert secret[4:] not in content
    assert token.hash in content
    assert TokenStore(store.path, key=KEY).authenticate(secret, audience="serve").name == "ci"


def test_each_reason_to_refuse_has_its_own_sentence(store: TokenStore) -> None:
    secret, token = store.issue("ci", ["client"], audience="serve", days=1)
    later = datetime.now(UTC) + timedelta(days=2)
    with pytest.raises(TokenError, match="expired on"):
        store.authenticate(secret, audience="serve", now=later)
    with pytest.raises(TokenError, match="is for 'serve', and this is 'registry'"):
        store.authenticate(secret, audience="registry")
    other, _ = TokenStore(store.path.with_name("other"), key=KEY).issue(
        "x", ["client"], audience="serve"
    )
    with pytest.raises(TokenError, match="unknown"):
        store.authenticate(other, audience="serve")
    with pytest.raises(TokenError, match="unknown"):
        TokenStore(store.path, key=bytes(32)).authenticate(secret, audience="serve")
    store.revoke(token.id)
    with pytest.raises(TokenError, match=f"Token {token.id} was revoked on"):
        store.authenticate(secret, audience="serve")
    with pytest.raises(TokenError, match="no token 'none'"):
        store.revoke("none")


def test_the_end_itself_is_too_late(store: TokenStore) -> None:
    secret, token = store.issue("ci", ["client"], audience="serve")
    end = datetime.fromisoformat(token.expires_at)
    assert store.authenticate(secret, audience="serve", now=end - timedelta(seconds=1))
    with pytest.raises(TokenError, match="expired"):
        store.authenticate(secret, audience="serve", now=end)


@given(st.text(max_size=60))
def test_anything_else_is_malformed_and_not_repeated(text: str) -> None:
    store = TokenStore(Path("/nonexistent/tokens.json"), key=KEY)
    with pytest.raises(TokenError) as caught:
        store.authenticate(text, audience="serve")
    if len(text) > 8:
        assert text not in str(caught.value)


@pytest.mark.parametrize("change", range(43))
def test_one_changed_character_is_unknown(store: TokenStore, change: int) -> None:
    secret, _ = store.issue("ci", ["client"], audience="serve")
    other = "A" if secret[4 + change] != "A" else "B"
    with pytest.raises(TokenError, match="unknown"):
        store.authenticate(secret[: 4 + change] + other + secret[5 + change :], audience="serve")


def test_bad_requests_for_a_token(store: TokenStore) -> None:
    for days in (0, -1, 366, float("nan")):
        with pytest.raises(SecurityError, match="within 365 days"):
            store.issue("ci", ["client"], audience="serve", days=days)
    with pytest.raises(SecurityError, match="at least one role"):
        store.issue("ci", [], audience="serve")
    with pytest.raises(SecurityError, match="Unknown role 'root'"):
        store.issue("ci", ["root"], audience="serve")
    assert not store.path.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"schema": "forge-tokens/2", "tokens": []}',
        b'{"schema": "forge-tok',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_lets_nobody_in(store: TokenStore, content: bytes) -> None:
    secret, _ = store.issue("ci", ["client"], audience="serve")
    store.path.write_bytes(content)
    with pytest.raises(SecurityError, match="nobody is let in"):
        store.authenticate(secret, audience="serve")


def test_without_its_file_nobody_is_let_in_and_none_is_listed(store: TokenStore) -> None:
    """A missing file said of every token that it is unknown."""
    secret, _ = store.issue("ci", ["client"], audience="serve")
    store.path.unlink()
    with pytest.raises(SecurityError, match="there is no such file") as caught:
        store.authenticate(secret, audience="serve")
    assert not isinstance(caught.value, TokenError)
    assert store.tokens() == []
    another, _ = store.issue("ci", ["client"], audience="serve")
    assert store.authenticate(another, audience="serve").name == "ci"


@pytest.fixture
def reads(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every reading of the file."""
    found: list[Path] = []

    def counted(path: Path) -> bytes:
        found.append(path)
        return read_plain(path)

    monkeypatch.setattr("forge_harness.security.tokens.read_plain", counted)
    return found


def replace_with(path: Path, content: bytes, *, age_s: float = 60.0) -> None:
    path.write_bytes(content)
    then = time.time() - age_s
    os.utime(path, (then, then))


@pytest.mark.parametrize("content", [b"{}", b"x" * 100_000])
@pytest.mark.parametrize("age_s", [60.0, -3600.0])
def test_a_damaged_file_is_read_once_a_change_and_lets_nobody_in(
    store: TokenStore, reads: list[Path], content: bytes, age_s: float
) -> None:
    """Each request read all of it again: whoever can only ask could keep the server busy.

    Also where the clock was put back since the file was written.
    """
    secret, _ = store.issue("ci", ["client"], audience="serve")
    sound = store.path.read_bytes()
    replace_with(store.path, content, age_s=age_s)
    reads.clear()
    said = set()
    for _ in range(5):
        with pytest.raises(SecurityError, match="nobody is let in") as caught:
            store.authenticate(secret, audience="serve")
        said.add(str(caught.value))
    assert (len(reads), len(said)) == (1, 1)
    replace_with(store.path, content + b" ", age_s=age_s)
    for _ in range(5):
        with pytest.raises(SecurityError, match="nobody is let in"):
            store.authenticate(secret, audience="serve")
    assert len(reads) == 2
    replace_with(store.path, sound, age_s=age_s)
    for _ in range(5):
        assert store.authenticate(secret, audience="serve").name == "ci"
    assert len(reads) == 3


def test_a_file_that_is_just_being_written_is_looked_at_again(store: TokenStore) -> None:
    """A copy that is half there, and whole a moment later with the same length and time."""
    secret, _ = store.issue("ci", ["client"], audience="serve")
    sound = store.path.read_bytes()
    now = time.time()
    store.path.write_bytes(bytes(len(sound)))
    os.utime(store.path, (now, now))
    with pytest.raises(SecurityError, match="nobody is let in"):
        store.authenticate(secret, audience="serve")
    with store.path.open("r+b") as stream:
        stream.write(sound)
    os.utime(store.path, (now, now))
    assert store.authenticate(secret, audience="serve").name == "ci"


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(store: TokenStore) -> None:
    """The event loop of a server would have stood still."""
    secret, _ = store.issue("ci", ["client"], audience="serve")
    store.path.unlink()
    os.mkfifo(store.path)
    with pytest.raises(SecurityError, match="not a plain file"):
        store.authenticate(secret, audience="serve")


def test_a_file_that_could_not_be_read_is_tried_again(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files, for example: nothing about the file changes when that is over."""
    secret, _ = store.issue("ci", ["client"], audience="serve")
    replace_with(store.path, store.path.read_bytes())
    with monkeypatch.context() as patch:

        def refuse(path: Path) -> bytes:
            raise OSError(24, "Too many open files", str(path))

        patch.setattr("forge_harness.security.tokens.read_plain", refuse)
        with pytest.raises(SecurityError, match="nobody is let in"):
            store.authenticate(secret, audience="serve")
    assert store.authenticate(secret, audience="serve").name == "ci"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hash", []),
        ("hash", 7),
        ("id", None),
        ("name", {}),
        ("roles", "client"),
        ("roles", [1]),
        ("audience", 1),
        ("revoked_at", 5),
        ("expires_at", None),
    ],
)
def test_a_field_of_another_type_is_damage(store: TokenStore, field: str, value: object) -> None:
    secret, _ = store.issue("ci", ["client"], audience="serve")
    document = json.loads(store.path.read_bytes())
    document["tokens"][0][field] = value
    store.path.write_text(json.dumps(document))
    with pytest.raises(SecurityError, match="nobody is let in"):
        store.authenticate(secret, audience="serve")


def test_an_end_without_a_time_zone_is_refused(store: TokenStore) -> None:
    secret, _ = store.issue("ci", ["client"], audience="serve")
    document = json.loads(store.path.read_bytes())
    document["tokens"][0]["expires_at"] = "2999-01-01T00:00:00"
    store.path.write_text(json.dumps(document))
    with pytest.raises(SecurityError, match="time zone"):
        store.authenticate(secret, audience="serve")


def test_another_process_revokes_and_it_holds_here(store: TokenStore) -> None:
    secret, token = store.issue("ci", ["client"], audience="serve")
    store.authenticate(secret, audience="serve")
    TokenStore(store.path, key=KEY).revoke(token.id)
    os.utime(store.path)
    with pytest.raises(TokenError, match="revoked"):
        store.authenticate(secret, audience="serve")


def test_no_token_is_lost_when_several_are_issued_at_once(store: TokenStore) -> None:
    def issue(index: int) -> None:
        own = TokenStore(store.path, key=KEY)
        for number in range(5):
            own.issue(f"{index}-{number}", ["client"], audience="serve")

    threads = [threading.Thread(target=issue, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({token.name for token in store.tokens()}) == 20


def test_a_token_outlives_a_rotation_and_not_the_destruction_of_its_key(tmp_path: Path) -> None:
    path, keyring = tmp_path / "tokens.json", Keyring.new()
    secret, _ = TokenStore.of_keyring(path, keyring).issue("ci", ["client"], audience="serve")
    former, rotated = keyring.active_id(Purpose.TOKENS), keyring.rotated(Purpose.TOKENS)
    store = TokenStore.of_keyring(path, rotated)
    assert store.authenticate(secret, audience="serve").name == "ci"
    newer, _ = store.issue("cd", ["client"], audience="serve")
    with pytest.raises(TokenError, match="unknown"):
        TokenStore.of_keyring(path, keyring).authenticate(newer, audience="serve")
    store = TokenStore.of_keyring(path, rotated.destroyed(former))
    assert store.authenticate(newer, audience="serve").name == "cd"
    with pytest.raises(TokenError, match="unknown"):
        store.authenticate(secret, audience="serve")
