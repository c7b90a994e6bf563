"""An audit log that was tampered with says so, and without one nothing is done."""

import shutil
import sqlite3

import pytest

from forge_harness.probes.limits import file_size_limited

RECORDS = 8


@pytest.mark.forge_check("security.audit_tamper")
def test_audit_tamper(subject, evidence, tmp_path):
    """Whoever can write the files can change nothing of what was recorded unnoticed.

    Attacks on the SQLite file with its triggers dropped: each column of a record changed, records
    removed in the middle and at the end, renumbered, swapped, repeated, added; the whole file put
    back to an earlier state, replaced by another log's, emptied. Oracle: the log verified before.
    After Crosby and Wallach, "Efficient data structures for tamper-evident logging" (2009).
    """
    whole = _filled(subject, tmp_path / "whole", RECORDS)
    sound = _problems(subject, whole)
    evidence.equal("sound_log", sound, expected=0, unit="problems", reason="before any attack")
    shutil.copytree(whole.parent, tmp_path / "before")
    writer = subject.audit_log(whole)
    writer.add("auditor", "audit.check", "one more")
    writer.close()
    attacks = _attacks(_columns(whole))
    unnoticed = [name for name, do in attacks if _unnoticed(subject, whole, tmp_path / "a", do)]
    for name, source in (
        ("the file put back", tmp_path / "before" / whole.name),
        ("another log in its place", _filled(subject, tmp_path / "other", RECORDS + 1)),
    ):
        shutil.copytree(whole.parent, tmp_path / "b")
        _clean(tmp_path / "b" / whole.name)
        shutil.copy(source, tmp_path / "b" / whole.name)
        if _problems(subject, tmp_path / "b" / whole.name) == 0:
            unnoticed.append(name)
        shutil.rmtree(tmp_path / "b")
    evidence.record("attacks", len(attacks) + 2, unit="attacks", reason="on copies of one log")
    evidence.equal(
        "unnoticed",
        len(unnoticed),
        expected=0,
        unit="attacks",
        reason=", ".join(unnoticed[:4]) or "every one was found",
    )


def _filled(subject, folder, count):
    folder.mkdir()
    writer = subject.audit_log(folder / "audit.db")
    for number in range(count):
        writer.add(f"actor-{number}", "state.save", f"phase5/model-{number}")
    writer.close()
    return folder / "audit.db"


def _problems(subject, path):
    try:
        return len(subject.audit_problems(path))
    except Exception:
        return 1


def _columns(path):
    """Table of the records, its columns with their types, and the one that numbers them."""
    connection = sqlite3.connect(path)
    tables = [n for (n,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")]
    counts = {t: connection.execute(f"SELECT COUNT(*) FROM {t}").fetchone()[0] for t in tables}
    table = max(counts, key=counts.__getitem__)
    columns = connection.execute(f"PRAGMA table_info({table})").fetchall()
    connection.close()
    number = next(name for _, name, kind, *_ in columns if kind.upper().startswith("INT"))
    return table, number, [(name, kind.upper()) for _, name, kind, *_ in columns]


def _attacks(described):
    table, number, columns = described
    names = ", ".join(name for name, _ in columns if name != number)
    for_value = {"TEXT": "{0} || 'x'", "BLOB": "CAST(zeroblob(length({0})) AS BLOB)"}
    attacks = [
        (
            f"{name} changed",
            [f"UPDATE {table} SET {name} = {for_value[kind].format(name)} WHERE {number} = 3"],
        )
        for name, kind in columns
        if kind in for_value
    ]
    attacks += [
        ("one removed", [f"DELETE FROM {table} WHERE {number} = 4"]),
        (
            "one removed, the others renumbered",
            [
                f"DELETE FROM {table} WHERE {number} = 4",
                f"UPDATE {table} SET {number} = {number} - 1 WHERE {number} > 4",
            ],
        ),
        ("the last removed", [f"DELETE FROM {table} WHERE {number} = {RECORDS + 1}"]),
        ("the last five removed", [f"DELETE FROM {table} WHERE {number} > {RECORDS - 4}"]),
        ("the first removed", [f"DELETE FROM {table} WHERE {number} = 1"]),
        ("all removed", [f"DELETE FROM {table}"]),
        (
            "two swapped",
            [
                f"UPDATE {table} SET {number} = 99 WHERE {number} = 2",
                f"UPDATE {table} SET {number} = 2 WHERE {number} = 5",
                f"UPDATE {table} SET {number} = 5 WHERE {number} = 99",
            ],
        ),
        (
            "one repeated at the end",
            [
                f"INSERT INTO {table} ({number}, {names}) SELECT {RECORDS + 2}, {names} FROM "
                f"{table} WHERE {number} = 5"
            ],
        ),
    ]
    return attacks


def _unnoticed(subject, whole, scratch, statements):
    """Whether a copy of the log that was attacked still verifies."""
    shutil.copytree(whole.parent, scratch)
    path = scratch / whole.name
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    for (trigger,) in connection.execute(
        "SELECT name FROM sqlite_master WHERE type='trigger'"
    ).fetchall():
        connection.execute(f"DROP TRIGGER {trigger}")
    for statement in statements:
        connection.execute(statement)
    connection.close()
    found = _problems(subject, path)
    shutil.rmtree(scratch)
    return found == 0


def _clean(path):
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@pytest.mark.forge_check("security.audit_fail_closed")
def test_audit_fail_closed(subject, evidence, tmp_path):
    """An action that cannot be recorded is not done, and is when there is room again.

    Faults: no byte more for any file (RLIMIT_FSIZE), a file that is no log, a directory that cannot
    be made. Oracle: whether the action left its mark, a directory, which that limit allows.
    """
    path = _filled(subject, tmp_path / "log", 1)
    marks = tmp_path / "marks"
    marks.mkdir()
    evidence.equal(
        "done_with_a_log",
        _done(subject, path, marks / "sound"),
        expected=True,
        reason="the log takes a record",
    )
    with file_size_limited(1):
        done_without_room = _done(subject, path, marks / "full")
    evidence.equal(
        "done_without_room",
        done_without_room,
        expected=False,
        reason="the file system takes no byte more",
    )
    (tmp_path / "text").write_text("no log at all, and long enough to be looked at\n" * 50)
    for name, broken in (
        ("done_without_a_log", tmp_path / "text" / "audit.db"),
        ("done_with_another_file", tmp_path / "text"),
    ):
        evidence.equal(
            name, _done(subject, broken, marks / name), expected=False, reason="nothing can be kept"
        )
    evidence.equal(
        "done_again", _done(subject, path, marks / "again"), expected=True, reason="there is room"
    )
    evidence.equal(
        "log_problems", _problems(subject, path), expected=0, unit="problems", reason="afterwards"
    )


def _done(subject, path, mark):
    """Whether the action was done."""
    try:
        subject.audited(path, mark.mkdir)
    except Exception:
        return mark.exists()
    return mark.exists()
