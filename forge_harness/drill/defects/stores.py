"""What a state store does, in values that can be compared; see `forge_harness.drill.observe`.

Every observable opens the subject's store by its name, on a file system that notes each call: most
seeded bugs of a store show in nothing that it returns.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from forge_harness.drill.target import OWN_STORE, open_store
from forge_harness.state import NewState, RealFs, Store

LARGE = hashlib.shake_256(b"large").digest(40_000)
"""Over what a store keeps in its index."""
_WHOLE = 1 << 30
OTHER = hashlib.shake_256(b"other").digest(50_000)


class WatchedFs(RealFs):
    """Notes each call with what it is for; fails and shortens the calls it is told to.

    Attributes:
        calls: Names of the calls, and what each is for.
        failures: Name of a call -> how many of the next ones fail with EIO.
        longest_write: Bytes a write takes at most.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[str] = []
        self.failures: dict[str, int] = {}
        self.longest_write = _WHOLE
        self._handles: dict[int, Path] = {}

    def _note(self, name: str, *paths: Path) -> None:
        self.calls.append(" ".join([name, *map(self._place, paths)]))
        if self.failures.get(name, 0) > 0:
            self.failures[name] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _place(self, path: Path) -> str:
        if not path.is_relative_to(self.root):
            return "above"
        place = path.relative_to(self.root)
        # Temporary names are drawn.
        return "tmp/*" if place.parts[:1] == ("tmp",) and len(place.parts) > 1 else str(place)

    def create(self, path: Path) -> int:
        """See `Fs`."""
        self._note("create", path)
        handle = super().create(path)
        self._handles[handle] = path
        return handle

    def write(self, handle: int, data: memoryview) -> int:
        """See `Fs`."""
        self._note(f"write {len(data)}")
        return super().write(handle, data[: self.longest_write])

    def fsync(self, handle: int) -> None:
        """See `Fs`."""
        self._note("fsync", self._handles.get(handle, self.root))
        super().fsync(handle)

    def rename(self, source: Path, target: Path) -> None:
        """See `Fs`."""
        self._note("rename", source, target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        """See `Fs`."""
        self._note("unlink", path)
        super().unlink(path)

    def fsync_dir(self, path: Path) -> None:
        """See `Fs`."""
        self._note("fsync_dir", path)
        super().fsync_dir(path)


@contextlib.contextmanager
def _workspace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="forge-observed-") as folder:
        yield Path(folder) / "store"


def _open(subject: Any, root: Path, **options: Any) -> Store:
    return open_store(subject.state_store().opener, root, **options)


def _new(name: str = "a", data: bytes = LARGE) -> NewState:
    return NewState(phase="phase5", kind="k", name=name, files={"data": data})


def _raised(act: Callable[[], object]) -> str:
    """Names what an act ended with."""
    try:
        act()
    except Exception as error:
        return type(error).__name__
    return "nothing"


def _read(store: Store, name: str = "a", generation: int | None = None) -> object:
    try:
        return store.read(store.get("phase5", name, generation=generation))
    except Exception as error:
        return type(error).__name__


def _seen_by_others(root: Path) -> int:
    """Generations that another process would find."""
    with open_store(OWN_STORE, root) as store:
        return len(store.generations())


def _objects(root: Path) -> list[Path]:
    return sorted(path for path in (root / "objects").rglob("*") if path.is_file())


def _leave(root: Path, content: bytes, *, under: bytes = LARGE) -> None:
    """Puts a file where a killed writer would have left that content."""
    name = hashlib.sha256(under).hexdigest()
    (root / "objects" / name[:2]).mkdir(parents=True, exist_ok=True)
    (root / "objects" / name[:2] / name).write_bytes(content)


def commits(subject: Any) -> object:
    """The calls of commits, the note beside the index, its durability, and what others see then."""
    with _workspace() as root:
        fs = WatchedFs(root)
        with _open(subject, root, fs=fs) as store:
            store.commit([_new(), _new("b", OTHER), _new("c", b"small")])
            others = [_seen_by_others(root), (root / "head").exists()]
            store.commit([_new()])
            others.append(_seen_by_others(root))
            durability = store._opened().connection.execute("PRAGMA synchronous").fetchone()
            read = [_read(store), _read(store, "b"), _read(store, "c")]
        return fs.calls, others, list(durability), read


def commits_over_leftovers(subject: Any) -> object:
    """The calls of commits whose contents a killed writer left: whole once, damaged once."""
    seen: list[object] = []
    for left in (LARGE, LARGE[:-1] + b"?"):
        with _workspace() as root:
            with _open(subject, root):
                _leave(root, left)
            fs = WatchedFs(root)
            with _open(subject, root, fs=fs) as store:
                store.commit([_new()])
                seen += [fs.calls, _read(store)]
    return seen


def commits_on_a_bad_disk(subject: Any) -> object:
    """How commits end whose calls fail or are cut short, and what is there afterwards."""
    seen: list[object] = []
    cases: Sequence[tuple[dict[str, int], int]] = (
        ({"fsync": 1}, _WHOLE),
        ({"fsync": 100}, _WHOLE),
        ({"rename": 100}, _WHOLE),
        ({"fsync_dir": 1}, _WHOLE),
        ({}, 1000),
    )
    for failures, longest in cases:
        with _workspace() as root:
            with _open(subject, root):
                pass
            fs = WatchedFs(root)
            with _open(subject, root, fs=fs) as store:
                fs.failures, fs.longest_write = dict(failures), longest
                # The lambda is called at once.
                seen.append(_raised(lambda: store.commit([_new()])))
            seen.append(_seen_by_others(root))
            with _open(subject, root) as store:
                seen.append(_read(store))
    return seen


def damaged(subject: Any) -> object:
    """What is read of a content that was changed, where it goes, and what a collection leaves."""
    with _workspace() as root, _open(subject, root) as store:
        store.commit([_new()])
        (file,) = _objects(root)
        file.chmod(0o600)
        file.write_bytes(LARGE[:-1] + b"?")
        seen: list[object] = [store.verify().ok, _read(store)]
        seen.append(len(list((root / "quarantine").iterdir())))
    with _workspace() as root:
        with _open(subject, root) as store:
            store.commit([_new("kept", OTHER)])
            store.commit([_new()])
        _damage_history(root)
        with _open(subject, root) as store:
            seen.append(_raised(lambda: store.collect(grace_s=0.0)))
        seen.append(len(_objects(root)))
    return seen


def _damage_history(root: Path) -> None:
    with closing(sqlite3.connect(root / "index.db")) as connection, connection:
        triggers = connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")
        for (name,) in triggers.fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for table in ("generation", "generation_copy"):
            connection.execute(f"UPDATE {table} SET manifest = x'00' WHERE number = 1")


def shared(subject: Any) -> object:
    """What is done while another process has the store alone, and to a commit that came between."""
    with _workspace() as root, _open(subject, root, lock_timeout_s=0.0) as store:
        store.commit([_new()])
        with (root / "lock").open("ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            seen = [_read(store), _raised(lambda: store.commit([_new("b")]))]
        store.commit([_new("c")])
        return [*seen, _raised(lambda: store.commit([_new("d")], parent=1)), _read(store, "d")]


def collected(subject: Any) -> object:
    """What a collection leaves of a commit being made, and of generations to be kept."""
    with _workspace() as root, _open(subject, root) as store:
        for content in (LARGE, OTHER, LARGE + OTHER):
            store.commit([_new(data=content)])
        young = root / "tmp" / "1-0"
        young.write_bytes(b"being written")
        store.collect(retain=1, keep=[1], grace_s=0.0)
        kept = [_read(store, generation=number) for number in (1, 2, 3)]
        young.write_bytes(b"being written")
        store.collect()
        return kept, young.exists(), len(_objects(root))


def old_stores(subject: Any) -> object:
    """Stores of other releases when they are opened: what they show, copies, a migration halted."""
    spec = subject.state_store()
    seen: list[object] = []
    for old in sorted(path for path in Path(spec.old_stores).iterdir() if path.is_dir()):
        with _workspace() as root:
            shutil.copytree(old, root)
            _halt(root)
            seen.append(_raised(lambda: _open(subject, root).close()))
            seen.append(_tables(root))
        with _workspace() as root:
            shutil.copytree(old, root)
            with _open(subject, root) as store:
                states = store.list()
                seen.append([[s.name, s.metadata, _read(store, s.name)] for s in states])
            seen.append(sum(1 for _ in root.glob("backups/*")))
    with _workspace() as root:
        _open(subject, root).close()
        with closing(sqlite3.connect(root / "index.db")) as connection:
            connection.execute("PRAGMA user_version = 99")
        seen.append(_raised(lambda: _open(subject, root).close()))
    return seen


def _halt(root: Path) -> None:
    """Puts a view in the way of what the next schema adds: its step fails on the way."""
    with closing(sqlite3.connect(root / "index.db")) as connection, connection:
        connection.execute("CREATE VIEW IF NOT EXISTS generation_copy AS SELECT 1")


def _tables(root: Path) -> list[str]:
    with closing(sqlite3.connect(root / "index.db")) as connection:
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return sorted(name for (name,) in rows)
