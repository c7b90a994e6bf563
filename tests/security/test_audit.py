from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from forge_harness.errors import AuditError
from forge_harness.security.audit import AuditEvent, AuditLog, AuditReport, Decision, verify
from forge_harness.security.audit_heads import Head, HeadFile, parse_head

from ..privileges import unprivileged

KEY, SEED = bytes(range(32)), bytes(range(1, 33))
PUBLIC = Ed25519PrivateKey.from_private_bytes(SEED).public_key()


def event(number: int = 0, **given: object) -> AuditEvent:
    values = {"actor": "ci", "action": "state.save", "resource": f"phase5/m{number}"}
    return AuditEvent(**{"decision": Decision.ALLOW, **values, **given})  # type: ignore[arg-type]


def opened(path: Path) -> AuditLog:
    return AuditLog(path, key=KEY, signing_key=SEED)


def checked(path: Path, newest: Head | None = None) -> AuditReport:
    return verify(path, keys=[KEY], public_keys=[PUBLIC], newest=newest)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    with opened(tmp_path / "audit.db") as log:
        for number in range(6):
            log.record(event(number))
    return tmp_path / "audit.db"


def heads_of(path: Path) -> list[bytes]:
    return path.with_name("audit.db.heads").read_bytes().splitlines()


def tamper(path: Path, *statements: str) -> None:
    """What somebody does who can write the file: no trigger stops him."""
    connection = sqlite3.connect(path)
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='trigger'"):
        connection.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_sound_log_verifies_and_goes_on_after_reopening(log: Path) -> None:
    assert checked(log) == AuditReport(6, 6, 6, ())
    with opened(log) as again:
        assert again.record(event(6)).number == 7
        assert [record.event.resource for record in again.tail(2)] == ["phase5/m5", "phase5/m6"]
    assert checked(log) == AuditReport(7, 7, 7, ())


def test_requests_share_groups_and_each_is_on_disk_when_answered(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    with opened(path) as log:
        futures = [log.submit(event(n, request_id=f"r{n}")) for n in range(700)]
        wait(futures, timeout=30)
        numbers = [future.result().number for future in futures]
        assert numbers == list(range(1, 701))
        connection = sqlite3.connect(path)
        assert connection.execute("SELECT COUNT(*) FROM event").fetchone() == (700,)
        connection.close()
    report = checked(path)
    assert (report.records, report.covered, report.problems) == (700, 700, ())
    assert report.heads < 20


def test_threads_and_processes_share_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    code = (
        "import sys; from pathlib import Path; from tests.security.test_audit import *\n"
        "with opened(Path(sys.argv[1])) as log:\n"
        "    for n in range(20): log.record(event(n))\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    children = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(2)]
    with opened(path) as log:
        threads = [
            threading.Thread(target=lambda: [log.record(event(n)) for n in range(20)])
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    report = checked(path)
    assert (report.records, report.covered, report.problems) == (80, 80, ())


def test_a_log_verifies_while_it_is_written(tmp_path: Path) -> None:
    """Heads of records that came while it read the others looked like a tail that was cut off."""
    path, is_over = tmp_path / "audit.db", threading.Event()
    with opened(path) as log:
        wait([log.submit(event(n)) for n in range(500)], timeout=30)

        def write() -> None:
            while not is_over.is_set():
                log.record(event())

        writer = threading.Thread(target=write)
        writer.start()
        reports = [checked(path) for _ in range(3)]
        is_over.set()
        writer.join()
    assert [report.problems for report in reports] == [()] * 3
    assert reports[0].records < reports[-1].records


def test_a_head_that_comes_after_a_newer_one_is_not_needed(log: Path) -> None:
    lines = heads_of(log)
    newest = parse_head(lines[-1])
    heads = HeadFile(log.with_name("audit.db.heads"))
    signing = Ed25519PrivateKey.from_private_bytes(SEED)
    older = parse_head(lines[3])
    given = heads.add(newest.log_id, older.number, bytes.fromhex(older.mac), signing)
    assert given == newest
    assert heads_of(log) == lines
    assert checked(log) == AuditReport(6, 6, 6, ())


def test_the_file_takes_additions_only(log: Path) -> None:
    connection = sqlite3.connect(log)
    for statement in (
        "UPDATE event SET actor = 'x' WHERE number = 2",
        "DELETE FROM event WHERE number = 6",
        "DELETE FROM log",
        "UPDATE log SET id = ''",
        "INSERT INTO event SELECT 7, time, actor, action, resource, decision, request_id, detail,"
        " previous, mac FROM event WHERE number = 5",
        "INSERT INTO event SELECT 9, time, actor, action, resource, decision, request_id, detail,"
        " mac, mac FROM event WHERE number = 6",
    ):
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(statement)
    connection.close()


ATTACKS = {
    "edit": ("UPDATE event SET actor = 'mallory' WHERE number = 3",),
    "edit the decision": ("UPDATE event SET decision = 'deny' WHERE number = 3",),
    "edit the detail": ("""UPDATE event SET detail = '{"a":1}' WHERE number = 3""",),
    "edit the time": ("UPDATE event SET time = '2020' WHERE number = 6",),
    "delete in the middle": ("DELETE FROM event WHERE number = 3",),
    "delete and renumber": (
        "DELETE FROM event WHERE number = 3",
        "UPDATE event SET number = number - 1 WHERE number > 3",
    ),
    "cut the tail off": ("DELETE FROM event WHERE number > 4",),
    "delete everything": ("DELETE FROM event",),
    "reorder": (
        "UPDATE event SET number = 100 WHERE number = 2",
        "UPDATE event SET number = 2 WHERE number = 3",
        "UPDATE event SET number = 3 WHERE number = 100",
    ),
    "another log's id": ("UPDATE log SET id = '00'",),
    "swap two macs": (
        "UPDATE event SET mac = (SELECT mac FROM event WHERE number = 2) WHERE number = 5",
    ),
    "append without the key": (
        "INSERT INTO event SELECT 7, time, actor, action, resource, decision, request_id, detail,"
        " mac, zeroblob(32) FROM event WHERE number = 6",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_on_the_file_is_found(log: Path, attack: str) -> None:
    tamper(log, *ATTACKS[attack])
    assert checked(log).problems


@pytest.mark.parametrize(
    "detail",
    [
        '{"x":NaN}',
        '{"x":12345678901234567890}',
        r'{"x":"\ud800"}',
        "[1]",
        "null",
        "no JSON",
        "[" * 100_000 + "]" * 100_000,
        # What reads as the record did, to us.
        '{"rows":2,"rows":1}',
        '[["rows",1]]',
        '{"rows": 1}',
        '{"rows":1.0}',
    ],
    ids=lambda text: text[:12],
)
def test_a_detail_that_was_written_otherwise_is_a_changed_one(log: Path, detail: str) -> None:
    with opened(log) as again:
        again.record(event(6, detail={"rows": 1}))
        again.record(event(7))
    tamper(log, f"UPDATE event SET detail = '{detail}' WHERE number = 7")
    assert checked(log).problems == ("Record 7 was changed, or written with another key.",)
    with opened(log) as again:
        assert again.tail(2)[0].event.detail == {0: detail}


def test_numbers_that_are_written_without_a_point_verify(log: Path) -> None:
    given = {"a": 1e20, "b": 1e16, "c": -0.0, "d": 0.1, "e": 2**53 - 1, "f": 1e-320}
    with opened(log) as again:
        again.record(event(6, detail=given))
        assert again.tail(1)[0].event.detail == given
    assert checked(log) == AuditReport(7, 7, 7, ())


@pytest.mark.parametrize(
    "given",
    [
        {"detail": {"x": float("nan")}},
        {"detail": {"x": 2**60}},
        {"detail": {"x": Path("x")}},
        {"resource": "\udcff"},
        {"actor": 5},
    ],
    ids=["nan", "beyond JSON", "an object", "not UTF-8", "no text"],
)
def test_an_event_that_cannot_be_represented_is_not_recorded(log: Path, given) -> None:
    with opened(log) as again:
        with pytest.raises(AuditError, match=r"'state\.save' cannot be recorded"):
            again.record(event(6, **given))
        with pytest.raises(AuditError, match="cannot be recorded"):
            again.submit(event(6, **given)).result(20)
        again.record(event(7))
    assert checked(log) == AuditReport(7, 7, 7, ())


def test_a_log_rewritten_with_the_chain_key_is_found_by_its_heads(log: Path) -> None:
    """The chain key alone is not enough: the heads are signed with another."""
    heads = log.with_name("audit.db.heads")
    kept = heads.read_bytes()
    log.unlink()
    with AuditLog(log, key=KEY, signing_key=bytes(32)) as forged:
        for number in range(8):
            forged.record(event(number, actor="mallory"))
    assert any("not signed by a pinned key" in problem for problem in checked(log).problems)
    heads.write_bytes(kept)
    assert any("the file was replaced" in problem for problem in checked(log).problems)


def test_heads_removed_changed_or_reordered_are_found(log: Path) -> None:
    path, lines = log.with_name("audit.db.heads"), heads_of(log)

    def problems(kept: list[bytes]) -> tuple[str, ...]:
        path.write_bytes(b"".join(line + b"\n" for line in kept))
        return checked(log).problems

    assert not problems(lines)
    assert problems([])
    assert problems([lines[0], *lines[2:]])
    assert problems([lines[1], lines[0], *lines[2:]])
    changed = json.loads(lines[-1]) | {"number": 5}
    assert problems([*lines[:-1], json.dumps(changed).encode()])
    assert problems([*lines, b"garbage"])


def test_a_file_put_back_is_found_by_its_heads_and_both_by_a_head_kept_elsewhere(
    log: Path, tmp_path: Path
) -> None:
    earlier, heads = log.read_bytes(), log.with_name("audit.db.heads")
    earlier_heads = heads.read_bytes()
    with opened(log) as again:
        again.record(event(6))
    witness = parse_head(heads_of(log)[-1])
    assert not checked(log, witness).problems
    log.write_bytes(earlier)
    assert any("put back to an earlier state" in problem for problem in checked(log).problems)
    heads.write_bytes(earlier_heads)
    assert not checked(log).problems
    assert any("The head kept elsewhere" in problem for problem in checked(log, witness).problems)


def test_another_stores_log_is_told_apart(log: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with opened(tmp_path / "other" / "audit.db") as other:
        for number in range(6):
            other.record(event(number))
    log.write_bytes((tmp_path / "other" / "audit.db").read_bytes())
    assert any("the file was replaced" in problem for problem in checked(log).problems)


def test_a_torn_head_is_none_and_the_next_one_follows(log: Path) -> None:
    heads = log.with_name("audit.db.heads")
    heads.write_bytes(heads.read_bytes() + b'{"log_id": "torn')
    assert not checked(log).problems
    with opened(log) as again:
        again.record(event(6))
    assert checked(log) == AuditReport(7, 7, 7, ())


def test_credentials_are_not_recorded(tmp_path: Path) -> None:
    secret = "hf_" + "a1B2c3D4e5F6" + "g7H8i9J0k1L2m3N4o5P6"
    with opened(tmp_path / "audit.db") as log:
        detail = {"password": "hunter2hunter2", "note": secret, "steps": 3}  # forge-scan: no secret
        log.record(event(detail=detail))
        assert log.tail(1)[0].event.detail == {
            "password": "[redacted]",  # forge-scan: no secret
            "note": "[redacted]",
            "steps": 3,
        }
    assert not checked(tmp_path / "audit.db").problems
    for path in tmp_path.iterdir():
        assert secret.encode() not in path.read_bytes()


FULL = """
import resource, signal, sys
from pathlib import Path
from tests.security.test_audit import *
path = Path(sys.argv[1])
log = opened(path)
log.record(event(0))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = path.with_name("audit.db-wal").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 2000, resource.RLIM_INFINITY))
refused = 0
for number in range(20):
    try:
        log.record(event(number, detail={"x": "y" * 3000}))
    except AuditError:
        refused += 1
future = log.submit(event(99, detail={"x": "y" * 3000}))
refused += isinstance(future.exception(timeout=30), AuditError)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
number = log.record(event(100)).number
log.close()
print(refused, number)
"""


def test_without_space_nothing_is_acknowledged_and_with_space_it_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "audit.db")]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["21", "2"], done.stderr
    assert checked(tmp_path / "audit.db") == AuditReport(2, 2, 2, ())


def test_files_that_are_no_log(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, long enough to be looked at" * 20)
    connection = sqlite3.connect(tmp_path / "other.db")
    connection.execute("CREATE TABLE t (x)")
    connection.commit()
    connection.close()
    for name in ("text", "other.db"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(AuditError, match="no audit log"):
            opened(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(AuditError, match="cannot be opened"):
        checked(tmp_path / "none")
    assert not (tmp_path / "none").exists()


NO_ROOM = """
import resource, signal, sys
from pathlib import Path
from tests.security.test_audit import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 1000, 5000, 20_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        opened(Path(sys.argv[1]) / f"{limit}.db").record(event())
    except AuditError as error:
        print(int(error.exit_code), error)
"""


def test_a_place_without_room_is_not_called_no_log(tmp_path: Path) -> None:
    """A full disk said: "is no audit log (database or disk is full); name another file"."""
    command = [sys.executable, "-c", NO_ROOM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    said = done.stdout.splitlines()
    assert len(said) == 4
    assert all("free space" in sentence for sentence in said), said
    assert said[0].startswith("4 "), said
    for path in tmp_path.glob("*.db"):
        with opened(path) as log:
            assert log.record(event()).number == 1
        assert checked(path).problems == ()


@pytest.mark.parametrize("becomes", ["gone", "another"])
def test_a_log_that_was_moved_takes_no_record_until_it_is_back(log: Path, becomes: str) -> None:
    """As a rotation of logs does: SQLite went on in the moved file, its heads in a new one."""
    heads = log.with_name("audit.db.heads")
    with opened(log) as kept:
        kept.submit(event(6)).result()
        for path in (log, heads):
            path.rename(path.with_name(f"{path.name}.1"))
        if becomes == "another":
            log.touch()
        with pytest.raises(AuditError, match="moved, removed or replaced"):
            kept.record(event(7))
        with pytest.raises(AuditError, match="moved, removed or replaced"):
            kept.submit(event(7)).result()
        assert not heads.exists()
        for path in (log, heads):
            path.with_name(f"{path.name}.1").rename(path)
        kept.record(event(7))
    assert checked(log) == AuditReport(8, 8, 8, ())


CHECK = (
    "import sys; from pathlib import Path; from tests.security.test_audit import *\n"
    "print(checked(Path(sys.argv[1])))\n"
)
CUT_SHORT = (
    "import os, sys; from pathlib import Path; from tests.security.test_audit import *\n"
    "log = opened(Path(sys.argv[1])); log.record(event(6)); os._exit(0)\n"
)


@pytest.mark.parametrize("is_cut_short", [False, True], ids=["closed", "crashed"])
def test_a_log_beside_which_nothing_can_be_written_verifies(log: Path, is_cut_short: bool) -> None:
    """What is archived is read-only, and SQLite wants to put something beside what it reads."""
    root, count = Path(__file__).parents[2], 6 + is_cut_short
    if is_cut_short:
        subprocess.run([sys.executable, "-c", CUT_SHORT, str(log)], cwd=root, check=True)
        log.with_name("audit.db-shm").unlink()
        assert log.with_name("audit.db-wal").stat().st_size
    log.parent.chmod(0o555)
    command = [*unprivileged(), sys.executable, "-c", CHECK, str(log)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    log.parent.chmod(0o755)
    assert done.stdout.strip() == str(AuditReport(count, count, count, ())), done.stderr


def test_a_closed_log_refuses(tmp_path: Path) -> None:
    log = opened(tmp_path / "audit.db")
    log.submit(event()).result(timeout=10)
    log.close()
    log.close()
    with pytest.raises(AuditError, match="closed"):
        log.submit(event()).result(timeout=10)


def test_an_idle_log_vouches_for_its_newest_record(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("forge_harness.security.audit.HEAD_S", 0.2)
    path = tmp_path / "audit.db"
    with opened(path) as log:
        for number in range(4):
            log.submit(event(number)).result(10)
        deadline = time.monotonic() + 10
        while checked(path).covered < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert checked(path) == AuditReport(4, checked(path).heads, 4, ())
        # Nothing more is signed while nothing more is recorded.
        heads = checked(path).heads
        time.sleep(0.5)
        assert checked(path).heads == heads
    tamper(path, "DELETE FROM event WHERE number > 2")
    assert any("cut off" in problem for problem in checked(path).problems)


def test_a_head_that_cannot_be_written_while_idle_is_written_later(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("forge_harness.security.audit.HEAD_S", 0.05)
    path = tmp_path / "audit.db"
    refused = threading.Event()
    with opened(path) as log:
        log.submit(event(0)).result(10)

        def refuse(*_: object) -> None:
            refused.set()
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(log, "_headed_at", time.monotonic())
            patch.setattr(log, "_add_head", refuse)
            # Within HEAD_S of the last head: recorded without one.
            patch.setattr("forge_harness.security.audit.HEAD_S", 0.3)
            log.submit(event(1)).result(10)
            assert refused.wait(10)
        assert log.submit(event(2)).result(10).number == 3
    assert checked(path) == AuditReport(3, checked(path).heads, 3, ())


def without_heads(path: Path) -> Path:
    """Puts a directory where the heads are; returns where they went."""
    heads, kept = path.with_name("audit.db.heads"), path.with_name("kept")
    if heads.exists():
        heads.rename(kept)
    heads.mkdir()
    return kept


def with_heads(path: Path) -> None:
    heads, kept = path.with_name("audit.db.heads"), path.with_name("kept")
    heads.rmdir()
    if kept.exists():
        kept.rename(heads)


def decisions(log: AuditLog) -> list[str]:
    return [str(record.event.decision) for record in log.tail(99)]


def test_what_no_head_vouches_for_is_refused_until_one_does(tmp_path, monkeypatch, caplog) -> None:
    """A server went on answering 200, with records that could be cut off without a trace."""
    monkeypatch.setattr("forge_harness.security.audit.HEAD_S", 0.2)
    path = tmp_path / "audit.db"
    with opened(path) as log:
        log.submit(event(0)).result(10)
        without_heads(path)
        refused = []
        for number in range(12):
            refused.append(log.submit(event(number)).exception(10) is not None)
            time.sleep(0.05)
        assert all(refused[6:]), refused
        assert sum(refused) == 12 - refused.index(True), refused
        recorded = decisions(log)
        with_heads(path)
        log.submit(event(99)).result(10)
        # Of each that was refused after it was recorded a second record says so.
        late = recorded.count("error")
        assert len(recorded) == 1 + refused.index(True) + 2 * late
        assert decisions(log)[len(recorded) :] == ["allow"]
    report = checked(path)
    assert (report.covered, report.problems) == (report.records, ())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said
    assert "cannot be kept in" in said[0]
    assert said[1] == "Requests are recorded again."


def test_an_action_that_was_refused_for_want_of_a_head_is_recorded_as_such(tmp_path) -> None:
    path = tmp_path / "audit.db"
    without_heads(path)
    with opened(path) as log:
        for _ in range(3):
            with pytest.raises(AuditError, match="The head of the audit log cannot be kept"):
                log.record(event(1, detail={"steps": 3}))
        assert decisions(log) == ["allow", "error"]
        said = log.tail(1)[0].event
        assert (said.resource, said.detail["steps"]) == ("phase5/m1", 3)
        assert "cannot be kept in" in said.detail["error"]
        with_heads(path)
        assert log.record(event(2)).number == 3
    assert checked(path) == AuditReport(3, 2, 3, ())


def test_a_refusal_that_cannot_be_recorded_is_once_it_can(tmp_path, monkeypatch) -> None:
    path = tmp_path / "audit.db"
    without_heads(path)
    with opened(path) as log:
        append = log._append

        def full(events):
            if events[0].decision is Decision.ERROR:
                raise AuditError("full")
            return append(events)

        with monkeypatch.context() as patch:
            patch.setattr(log, "_append", full)
            with pytest.raises(AuditError, match="cannot be kept"):
                log.record(event(1))
            with pytest.raises(AuditError, match="full"):
                log.record(event(2))
            assert decisions(log) == ["allow"]
        with_heads(path)
        log.record(event(3))
        assert decisions(log) == ["allow", "error", "allow"]
    assert checked(path).problems == ()


def test_who_stops_waiting_stops_no_record(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    with opened(path) as log:
        log.submit(event(0)).result(10)
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        first, second = log.submit(event(1)), log.submit(event(2))
        second.cancel()
        third = log.submit(event(3))
        third.cancel()
        holder.execute("COMMIT")
        holder.close()
        assert first.result(30).number == 2
        assert log.submit(event(4)).result(30).number == 5
    # What a caller gave up on may have been done: it is on record too.
    assert checked(path).records == 5


def test_a_rotated_key_still_verifies_what_it_chained(tmp_path: Path) -> None:
    path, new = tmp_path / "audit.db", bytes(range(7, 39))
    for key, numbers in ((KEY, range(3)), (new, range(3, 6)), (KEY, range(6, 7))):
        with AuditLog(path, key=key, signing_key=SEED) as log:
            for number in numbers:
                log.record(event(number))
    assert verify(path, keys=[KEY, new], public_keys=[PUBLIC]).problems == ()
    for lost in ([KEY], [new]):
        problems = verify(path, keys=lost, public_keys=[PUBLIC]).problems
        assert any("written with another key" in problem for problem in problems)
    tamper(path, "UPDATE event SET actor = 'mallory' WHERE number = 2")
    (problem,) = verify(path, keys=[KEY, new], public_keys=[PUBLIC]).problems
    assert problem == "Record 2 was changed, or written with another key."


CLOSED_UNDER_WRITERS = """
import sys, threading, time
from pathlib import Path
from forge_harness.errors import AuditError
from forge_harness.security.audit import AuditEvent, AuditLog, Decision

event = AuditEvent(actor="ci", action="state.save", resource="a", decision=Decision.ALLOW)

def record(log):
    try:
        while True:
            log.record(event)
    except AuditError as error:
        assert str(error) == "The audit log is closed; open it again.", error

for attempt in range(20):
    path = Path(sys.argv[1]) / f"{attempt}.db"
    log = AuditLog(path, key=bytes(32), signing_key=bytes(32))
    writers = [threading.Thread(target=record, args=(log,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    time.sleep(0.005)
    log.close()
    for writer in writers:
        writer.join()
"""


def test_a_log_can_be_closed_while_other_threads_record(tmp_path: Path) -> None:
    """SQLite executed on memory it had been told to free, and the process died of it."""
    command = [sys.executable, "-c", CLOSED_UNDER_WRITERS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
