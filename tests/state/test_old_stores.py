"""Stores as earlier releases wrote them: frozen files, read and brought forward."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from forge_harness.errors import NewerSchemaError
from forge_harness.paths import fixtures_dir
from forge_harness.state import NewState, Store

OLD = fixtures_dir() / "state"
VERSIONS = ("v1", "v2", "v3")
# The frozen files themselves: whoever changes one has changed history.
FROZEN = {
    "v1": "0d63cd43f1ddafc17c4f13e5f9adb7ceb6ed05f314392b24dac3c07d2a55ac9f",
    "v2": "3882a0d18bd51bcc43ecbd87afb4b4317af003d60ec534937e72edd46d29d5a5",
    "v3": "b2311b14b87156f7ba0396a26bcf44ce69c60dd73a614bcfde15e3fd607f9f10",
}


def tree(root: Path) -> str:
    lines = [
        f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(root.rglob("*"))
        if path.is_file()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def copied(version: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD / version, tmp_path / version))


def shown(store: Store) -> dict[str, str]:
    return {
        f"{state.phase}/{state.name}/{file}": hashlib.sha256(store.read(state, file)).hexdigest()
        for state in store.list()
        for file in state.files
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_the_fixture_is_the_one_that_was_frozen(version: str) -> None:
    assert tree(OLD / version) == FROZEN[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_store_shows_what_it_held_and_goes_on(version: str, tmp_path: Path) -> None:
    root = copied(version, tmp_path)
    expected = json.loads((OLD / f"{version}.json").read_text())
    with Store.open(root, create=False) as store:
        assert shown(store) == expected
        assert [generation.note for generation in store.generations()] == [
            "round 1",
            "round 2",
            "round 3",
        ]
        report = store.verify()
        assert (report.problems, report.states) == ((), 6)
        earlier = store.get("phase5", "digits/step-1", generation=2)
        assert store.read(earlier) == b"first" * 9000
        new = NewState(phase="phase5", kind="model", name="new", files={"data": b"n" * 50_000})
        assert store.commit([new]).number == 4
        store.restore(2)
    with Store.open(root) as store:
        assert store.read(store.get("phase5", "digits/step-1")) == b"first" * 9000
        assert store.verify().ok


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_index_is_kept_as_it_was(version: str, tmp_path: Path) -> None:
    root = copied(version, tmp_path)
    before = dump(root / "index.db")
    with Store.open(root):
        pass
    (backup,) = (root / "backups").iterdir()
    assert backup.name == f"index-schema-{version[1]}.db"
    assert dump(backup) == before


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_old_store_is_not_migrated_by_a_reader(version: str, tmp_path: Path) -> None:
    root = copied(version, tmp_path)
    before = tree(root)
    with pytest.raises(Exception, match="schema"):
        Store.open(root, create=False, read_only=True)
    assert tree(root) == before


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_damaged_before_a_migration_is_damaged_after_it(
    version: str, tmp_path: Path
) -> None:
    root = copied(version, tmp_path)
    victim = max((p for p in (root / "objects").rglob("*") if p.is_file()), key=lambda p: p.name)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with Store.open(root) as store:
        assert [problem.what for problem in store.verify().problems if victim.name in problem.what]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_manifest_changed_before_a_migration_does_not_verify_after_it(
    version: str, tmp_path: Path
) -> None:
    root = copied(version, tmp_path)
    connection = sqlite3.connect(root / "index.db")
    if version == "v1":
        connection.execute("UPDATE state SET name = 'other' WHERE name = 'import'")
    else:
        (trigger,) = connection.execute(
            "SELECT sql FROM sqlite_master WHERE name = 'generation_stays'"
        ).fetchone()
        connection.execute("DROP TRIGGER generation_stays")
        connection.execute(
            "UPDATE generation SET manifest = CAST(replace(manifest, 'import', 'export') AS BLOB)"
        )
        connection.execute(trigger)
    connection.commit()
    connection.close()
    with Store.open(root) as store:
        assert not store.verify().ok


def test_a_newer_store_is_refused_and_stays_byte_for_byte(tmp_path: Path) -> None:
    root = copied("v3", tmp_path)
    connection = sqlite3.connect(root / "index.db")
    connection.execute("PRAGMA user_version = 4")
    connection.commit()
    connection.close()
    before = tree(root)
    for options in ({}, {"create": False}, {"read_only": True}):
        with pytest.raises(NewerSchemaError, match="schema 4; this release reads up to 3"):
            Store.open(root, **options)  # type: ignore[arg-type]
    assert tree(root) == before


def dump(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    try:
        return list(connection.iterdump())
    finally:
        connection.close()


def test_an_older_copy_is_no_reason_to_keep_none(tmp_path: Path) -> None:
    """Back to the old release and forward again: the copy of the first time was all there was."""
    root = copied("v2", tmp_path)
    first = dump(root / "index.db")
    with Store.open(root):
        pass
    (kept,) = (root / "backups").iterdir()
    shutil.copyfile(kept, root / "index.db")
    connection = sqlite3.connect(root / "index.db")
    connection.execute("INSERT INTO object VALUES (?, 3, x'')", ("f" * 64,))
    connection.commit()
    connection.close()
    second = dump(root / "index.db")
    with Store.open(root):
        pass
    places = sorted((root / "backups").iterdir(), key=lambda path: len(path.name))
    copies = [dump(path) for path in places]
    assert copies == [first, second]
    assert list((root / "tmp").iterdir()) == []


def test_the_same_index_is_kept_once(tmp_path: Path) -> None:
    """A migration that was killed after its copy is repeated at the next open."""
    root = copied("v2", tmp_path)
    for _ in range(3):
        shutil.copyfile(OLD / "v2" / "index.db", root / "index.db")
        with Store.open(root):
            pass
    assert [path.name for path in (root / "backups").iterdir()] == ["index-schema-2.db"]
