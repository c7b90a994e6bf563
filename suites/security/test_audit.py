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
    attacks = _attacks(_described(whole))
    seen = {name: _unnoticed(subject, whole, tmp_path / "a", do) for name, do in attacks}
    unnoticed = [name for name, result in seen.items() if result]
    impossible = [name for name, result in seen.items() if result is None]
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
    tried = len(attacks) - len(impossible) + 2
    refused = f"; the table itself refuses: {', '.join(impossible)}" if impossible else ""
    evidence.record("attacks", tried, unit="attacks", reason=f"on copies of one log{refused}")
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


def _described(path):
    """Table of the records, the column that numbers them, all columns, and the numbers."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    rows = {t: connection.execute(f'SELECT * FROM "{t}"').fetchall() for (t,) in found}
    table = max(rows, key=lambda name: (sum(map(_names_an_actor, rows[name])), len(rows[name])))
    columns = connection.execute(f'PRAGMA table_info("{table}")').fetchall()
    connection.close()
    # A column of times may be distinct as well: the key comes first.
    for name in (column["name"] for column in sorted(columns, key=lambda each: not each["pk"])):
        numbers = sorted(row[name] for row in rows[table] if isinstance(row[name], int))
        if len(set(numbers)) == len(rows[table]) > RECORDS:
            return f'"{table}"', name, [column["name"] for column in columns], numbers
    pytest.skip(f"no column of {table!r} numbers {RECORDS + 1} records: nothing to attack them by")


def _names_an_actor(row):
    return any(isinstance(value, str) and "actor-" in value for value in row)


CHANGED = (
    "CASE typeof({0}) WHEN 'blob' THEN CAST(zeroblob(length({0})) AS BLOB)"
    " WHEN 'integer' THEN {0} + 1 WHEN 'real' THEN {0} + 1 ELSE coalesce({0}, '') || 'x' END"
)
"""Another value of the type that a column has."""


def _attacks(described):
    table, key, columns, numbers = described
    quoted = {name: f'"{name}"' for name in columns if name != key}
    number, names, last = f'"{key}"', ", ".join(quoted.values()), numbers[-1]
    third = f"{number} = {numbers[2]}"
    changed = {name: (column, CHANGED.format(column)) for name, column in quoted.items()}
    attacks = [
        (f"{name} changed", [f"UPDATE {table} SET {c} = {v} WHERE {third} AND {c} IS NOT {v}"])
        for name, (c, v) in changed.items()
    ]
    attacks += [
        ("one removed", [f"DELETE FROM {table} WHERE {number} = {numbers[3]}"]),
        (
            "one removed, the others renumbered",
            [
                f"DELETE FROM {table} WHERE {number} = {numbers[3]}",
                f"UPDATE {table} SET {number} = {number} - 1 WHERE {number} > {numbers[3]}",
            ],
        ),
        ("the last removed", [f"DELETE FROM {table} WHERE {number} = {last}"]),
        ("the last five removed", [f"DELETE FROM {table} WHERE {number} > {numbers[-6]}"]),
        ("the first removed", [f"DELETE FROM {table} WHERE {number} = {numbers[0]}"]),
        ("all removed", [f"DELETE FROM {table}"]),
        (
            "two swapped",
            [
                f"UPDATE {table} SET {number} = {last + 90} WHERE {number} = {numbers[1]}",
                f"UPDATE {table} SET {number} = {numbers[1]} WHERE {number} = {numbers[4]}",
                f"UPDATE {table} SET {number} = {numbers[4]} WHERE {number} = {last + 90}",
            ],
        ),
        (
            "one repeated at the end",
            [
                f"INSERT INTO {table} ({number}, {names}) SELECT {last + 1}, {names} FROM "
                f"{table} WHERE {number} = {numbers[4]}"
            ],
        ),
    ]
    return attacks


def _unnoticed(subject, whole, scratch, statements):
    """Whether a copy of the log that was attacked still verifies; None where it cannot be so."""
    shutil.copytree(whole.parent, scratch)
    path = scratch / whole.name
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    for (trigger,) in connection.execute(
        "SELECT name FROM sqlite_master WHERE type='trigger'"
    ).fetchall():
        connection.execute(f'DROP TRIGGER "{trigger}"')
    before = connection.total_changes
    try:
        for statement in statements:
            connection.execute(statement)
        changed = connection.total_changes > before
    except sqlite3.IntegrityError:
        # A column that is unique takes no second record of one value.
        changed = False
    connection.close()
    found = _problems(subject, path) if changed else None
    shutil.rmtree(scratch)
    return None if found is None else found == 0


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
