"""Every seeded bug is alive: it does something the store does not."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sqlite3
from collections import Counter

import pytest

from forge_harness.drill.storage import CAMPAIGNS, MUTANTS, shipped_old_stores
from forge_harness.drill.target import OWN_STORE, open_store
from forge_harness.errors import ForgeError
from forge_harness.state import NewState, RealFs, migrations
from forge_harness.state.schema import APPLICATION_ID

OPENERS = {mutant.name: mutant.opener for mutant in MUTANTS}
LARGE = bytes(40_000)


class Counting(RealFs):
    """Counts operations, and fails those it is told to."""

    def __init__(self, **failures):
        self.counts = Counter()
        self.failures = failures

    def _count(self, name):
        self.counts[name] += 1
        if self.failures.get(name, 0) > 0:
            self.failures[name] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fsync(self, handle):
        self._count("fsync")
        super().fsync(handle)

    def fsync_dir(self, path):
        self._count("fsync_dir")
        super().fsync_dir(path)

    def rename(self, source, target):
        self._count("rename")
        super().rename(source, target)


def new(name="a", data=LARGE):
    return NewState(phase="phase5", kind="k", name=name, files={"data": data})


def commits(opener, root, **failures):
    """Whether a commit on a file system that fails this way is acknowledged, and what it did."""
    with open_store(opener, root):
        pass
    fs = Counting(**failures)
    with open_store(opener, root, fs=fs) as store:
        fs.counts.clear()
        with contextlib.suppress(ForgeError):
            store.commit([new()])
            return True, fs.counts
    return False, fs.counts


def generations(root):
    with open_store(OWN_STORE, root) as store:
        return len(store.generations())


def no_file_sync(opener, root):
    return commits(opener, root)[1]["fsync"] == 0


def no_name_sync(opener, root):
    return commits(opener, root)[1]["fsync_dir"] == 0


def retried_sync(opener, root):
    return commits(opener, root, fsync=1)[0]


def ignored_sync(opener, root):
    return commits(opener, root, fsync=100)[0]


def index_first(opener, root):
    commits(opener, root, rename=100)
    return generations(root) == 1


def in_place(opener, root):
    with open_store(opener, root) as store:
        store.commit([new()])
        (file,) = [path for path in (root / "objects").rglob("*") if path.is_file()]
        os.utime(file, (1, 1))
        store.commit([new()])
    return file.stat().st_mtime != 1


def no_check(opener, root):
    with open_store(opener, root) as store:
        store.commit([new()])
        (file,) = [path for path in (root / "objects").rglob("*") if path.is_file()]
        file.write_bytes(b"x" + LARGE[1:])
        with contextlib.suppress(ForgeError):
            return store.read(store.get("phase5", "a")) != LARGE
    return False


def no_lock(opener, root):
    with open_store(opener, root, lock_timeout_s=0.0) as store:
        store.commit([new()])
        with (root / "lock").open("ab") as held, contextlib.suppress(ForgeError):
            fcntl.flock(held, fcntl.LOCK_EX)
            store.commit([new("b")])
            return True
    return False


def short_writes(opener, root):
    class Short(RealFs):
        def write(self, handle, data):
            return super().write(handle, data[:1000])

    with open_store(opener, root, fs=Short()) as store:
        store.commit([new()])
        with contextlib.suppress(ForgeError):
            return store.read(store.get("phase5", "a")) != LARGE
    return True


def deletes_damaged(opener, root):
    with open_store(opener, root) as store:
        store.commit([new()])
        (file,) = [path for path in (root / "objects").rglob("*") if path.is_file()]
        file.write_bytes(b"x" + LARGE[1:])
        with contextlib.suppress(ForgeError):
            store.read(store.get("phase5", "a"))
    return not any((root / "quarantine").iterdir())


def no_adopt_sync(opener, root):
    digest = hashlib.sha256(LARGE).hexdigest()
    with open_store(opener, root):
        (root / "objects" / digest[:2]).mkdir()
        (root / "objects" / digest[:2] / digest).write_bytes(LARGE)
    fs = Counting()
    with open_store(opener, root, fs=fs) as store:
        store.commit([new()])
    return fs.counts["fsync"] == 1


def trusts_orphans(opener, root):
    digest = hashlib.sha256(LARGE).hexdigest()
    with open_store(opener, root) as store:
        (root / "objects" / digest[:2]).mkdir()
        (root / "objects" / digest[:2] / digest).write_bytes(b"x" + LARGE[1:])
        store.commit([new()])
        with contextlib.suppress(ForgeError):
            return store.read(store.get("phase5", "a")) != LARGE
    return True


def collects_damaged(opener, root):
    with open_store(opener, root) as store:
        store.commit([new("kept", b"kept" * 9000)])
        store.commit([new()])
    with contextlib.closing(sqlite3.connect(root / "index.db")) as connection, connection:
        triggers = connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")
        for (name,) in triggers.fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for table in ("generation", "generation_copy"):
            connection.execute(f"UPDATE {table} SET manifest = x'00' WHERE number = 1")
    with open_store(opener, root) as store, contextlib.suppress(ForgeError):
        store.collect(grace_s=0.0)
    return len([path for path in (root / "objects").rglob("*") if path.is_file()]) < 2


def no_backup(opener, root):
    shutil.copytree(shipped_old_stores() / "v2", root)
    with open_store(opener, root):
        pass
    return not (root / "backups").exists()


def no_read_lock(opener, root):
    with open_store(opener, root, lock_timeout_s=0.0) as store:
        store.commit([new()])
        with (root / "lock").open("ab") as held, contextlib.suppress(ForgeError):
            fcntl.flock(held, fcntl.LOCK_EX)
            return bool(store.read(store.get("phase5", "a")))
    return False


def ignores_parent(opener, root):
    with open_store(opener, root) as store:
        store.commit([new()])
        store.commit([new("b")])
        with contextlib.suppress(ForgeError):
            return bool(store.commit([new("c")], parent=1))
    return False


def no_head(opener, root):
    commits(opener, root)
    return not (root / "head").exists()


def no_grace(opener, root):
    with open_store(opener, root) as store:
        store.commit([new()])
        young = root / "tmp" / "1-0"
        young.write_bytes(b"being written")
        store.collect()
    return not young.exists()


def forgets_kept(opener, root):
    with open_store(opener, root) as store:
        for round_ in range(2):
            store.commit([new(data=bytes([round_]) * 40_000)])
        store.collect(retain=1, keep=[1], grace_s=0.0)
        with contextlib.suppress(ForgeError):
            store.read(store.get("phase5", "a", generation=1))
            return False
    return True


def early_answer(opener, root):
    with open_store(opener, root) as store:
        store.commit([new()])
        return generations(root) == 0


def unsynced_index(opener, root):
    with open_store(opener, root) as store:
        return store._opened().connection.execute("PRAGMA synchronous").fetchone() == (1,)


def two_commits(opener, root):
    with open_store(opener, root) as store:
        store.commit([new(), new("b")])
    return generations(root) == 2


def any_schema(opener, root):
    with open_store(opener, root):
        pass
    with contextlib.closing(sqlite3.connect(root / "index.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with contextlib.suppress(ForgeError), open_store(opener, root):
        return True
    return False


def piecemeal_migration(opener, root, monkeypatch):
    def half(connection):
        connection.execute("ALTER TABLE generation RENAME TO generation_2")
        raise sqlite3.OperationalError("killed")

    root.mkdir()
    with contextlib.closing(sqlite3.connect(root / "index.db")) as connection:
        connection.executescript(migrations._LAYOUT_2)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 2")
    monkeypatch.setitem(migrations.STEPS, 2, half)
    with contextlib.suppress(ForgeError, sqlite3.Error), open_store(opener, root):
        pass
    with contextlib.closing(sqlite3.connect(root / "index.db")) as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    return "generation_2" in names


@pytest.mark.parametrize("name", sorted(OPENERS))
def test_a_seeded_bug_is_alive(name, tmp_path, monkeypatch):
    differs = globals()[name]
    more = (monkeypatch,) if name == "piecemeal_migration" else ()
    assert differs(OPENERS[name], tmp_path / "mutant", *more)
    assert not differs(OWN_STORE, tmp_path / "store", *more)


def test_there_are_at_least_eight_and_each_has_its_campaign():
    assert len(MUTANTS) >= 8
    assert {mutant.campaign for mutant in MUTANTS} <= set(CAMPAIGNS)
    assert len(OPENERS) == len(MUTANTS)
