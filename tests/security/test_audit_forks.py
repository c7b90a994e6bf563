"""An audit log that was open when its process was forked: the child must not write to it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from forge_harness.security import audit
from forge_harness.security.audit import AuditEvent, AuditLog, Decision, verify
from forge_harness.security.audit_heads import HeadFile

from ..forking import child_that_lives_on, forked, needs_fork, with_threads

pytestmark = [needs_fork, with_threads]

KEY, SEED = bytes(range(32)), bytes(range(1, 33))
PUBLIC = Ed25519PrivateKey.from_private_bytes(SEED).public_key()
REFUSED = "AuditError: The audit log was opened before this process was forked; open it again."


def event(actor: str = "parent") -> AuditEvent:
    return AuditEvent(actor=actor, action="state.save", resource="a", decision=Decision.ALLOW)


def opened(path: Path) -> AuditLog:
    return AuditLog(path, key=KEY, signing_key=SEED)


def actors(path: Path) -> list[str]:
    """Who recorded what is there, once all of it is sound."""
    assert verify(path, keys=[KEY], public_keys=[PUBLIC]).problems == ()
    with opened(path) as log:
        return [record.event.actor for record in log.tail(100)]


USES = {
    "record": lambda log: log.record(event("child")),
    "submit": lambda log: log.submit(event("child")).result(timeout=5),
    "tail": lambda log: log.tail(1),
}


@pytest.mark.parametrize("use", sorted(USES))
def test_a_child_is_refused_and_the_log_of_its_parent_goes_on(tmp_path: Path, use: str) -> None:
    """Its requests were never answered: the thread that records them is not there."""
    with opened(tmp_path / "audit.db") as log:
        log.submit(event()).result(timeout=10)
        assert forked(lambda: USES[use](log)) == REFUSED
        log.record(event())
    assert actors(tmp_path / "audit.db") == ["parent", "parent"]


def test_what_a_child_adds_after_its_parent_closed_is_not_acknowledged(tmp_path: Path) -> None:
    """It went into a write-ahead log that the parent had removed, and was gone."""
    log = opened(tmp_path / "audit.db")
    log.record(event())
    assert forked(lambda: log.record(event("child")), after=log.close) == REFUSED
    assert actors(tmp_path / "audit.db") == ["parent"]


def test_a_child_leaves_the_log_of_its_parent_alone_and_opens_its_own(tmp_path: Path) -> None:
    with opened(tmp_path / "audit.db") as log:
        log.record(event())
        log.submit(event()).result(timeout=10)

        def close_and_open() -> str:
            log.close()
            with opened(tmp_path / "audit.db") as own:
                own.record(event("child"))
            return "done"

        assert forked(close_and_open) == "done"
        log.record(event())
    assert actors(tmp_path / "audit.db") == ["parent", "parent", "child", "parent"]


@pytest.mark.parametrize("use", [*sorted(USES), "close"])
def test_a_child_forked_while_another_thread_records_waits_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    inside, go = threading.Event(), threading.Event()
    mac_of = audit.mac_of

    def slow(*arguments: object) -> bytes:
        inside.set()
        go.wait(30)
        return mac_of(*arguments)  # type: ignore[arg-type]

    with opened(tmp_path / "audit.db") as log:
        log.submit(event()).result(timeout=10)
        monkeypatch.setattr(audit, "mac_of", slow)
        recording = threading.Thread(target=log.record, args=(event(),))
        recording.start()
        inside.wait(10)
        said = forked(lambda: log.close() if use == "close" else USES[use](log))
        go.set()
        recording.join()
    assert said == ("None" if use == "close" else REFUSED)
    assert actors(tmp_path / "audit.db") == ["parent", "parent"]


def test_a_child_forked_while_a_head_is_added_keeps_no_head_out(tmp_path: Path) -> None:
    """The next head of the parent waited for the child, and with it every control action."""
    heads, key = HeadFile(tmp_path / "heads"), Ed25519PrivateKey.from_private_bytes(SEED)
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with heads._locked():
            held.set()
            go.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    with child_that_lives_on():
        go.set()
        holder.join()
        adding = threading.Thread(target=heads.add, args=("log", 1, bytes(32), key), daemon=True)
        adding.start()
        adding.join(5)
        assert not adding.is_alive()
    assert os.path.getsize(tmp_path / "heads") > 0
