from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from forge_harness.errors import DamagedStateError
from forge_harness.state import NewState, RealFs, State, Store, VerifyReport, history, lock
from forge_harness.state.contents import Contents
from forge_harness.state.index import Index

from ..forking import child_that_lives_on, forked, needs_fork, with_threads

CLOSED_UNDER_READERS = """
import sys, threading, time
from pathlib import Path
from forge_harness.errors import StateError
from forge_harness.state import NewState, Store

def read(store, state):
    try:
        while True:
            store.read(state)
    except StateError as error:
        assert "was closed. Open" in str(error), error

for attempt in range(30):
    store = Store.open(Path(sys.argv[1]) / str(attempt))
    store.commit([NewState(phase="p", kind="k", name="n", files={"data": b"x" * 1000})])
    state = store.get("p", "n")
    readers = [threading.Thread(target=read, args=(store, state)) for _ in range(3)]
    for reader in readers:
        reader.start()
    time.sleep(0.005)
    store.close()
    for reader in readers:
        reader.join()
"""


def new(name: str, content: bytes = b"content") -> NewState:
    return NewState(phase="phase5", kind="checkpoint", name=name, files={"data": content})


def test_a_store_can_be_closed_while_other_threads_read_it(tmp_path):
    """SQLite executed on memory it had been told to free, and the process died of it."""
    command = [sys.executable, "-c", CLOSED_UNDER_READERS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_list_shows_a_commit_of_another_thread_whole_or_not_at_all(tmp_path, monkeypatch):
    listing, half_way, listed = (threading.Event() for _ in range(3))
    view = history.History.view

    def view_late(self, number=None):
        if threading.current_thread() is reader:
            listing.set()
            half_way.wait(1.0)  # Never comes where the commit has to wait for the list.
        return view(self, number)

    def apply_slowly(shown, manifest):
        for key, state in manifest.changes:
            shown[key] = state
            if listing.is_set() and not half_way.is_set():
                half_way.set()
                listed.wait(5.0)

    found = []

    def look():
        found.extend(state.generation for state in store.list())
        listed.set()

    with Store.open(tmp_path / "store") as store:
        store.commit([new("a"), new("b")])
        monkeypatch.setattr(history.History, "view", view_late)
        monkeypatch.setattr(history, "_apply", apply_slowly)
        reader = threading.Thread(target=look)
        reader.start()
        listing.wait(5.0)
        store.commit([new("a", b"other"), new("b", b"other")])
        reader.join()
    assert found in ([1, 1], [2, 2])


@needs_fork
@with_threads
def test_a_child_of_fork_does_not_commit_to_what_its_parent_had_open(tmp_path):
    """Its commits went into a log that the parent had removed, and were acknowledged."""
    root = tmp_path / "store"
    store = Store.open(root)
    store.commit([new("before")])
    said = forked(lambda: store.commit([new("child")]).number, after=store.close)
    assert "was opened before this process was forked. Open the store again" in said
    with Store.open(root) as again:
        assert [state.name for state in again.list()] == ["before"]
        assert again.problems() == []


@needs_fork
@with_threads
def test_a_child_of_fork_leaves_the_store_of_its_parent_alone_and_opens_its_own(tmp_path):
    root = tmp_path / "store"
    with Store.open(root) as store:
        store.commit([new("before")])

        def close_and_open():
            store.close()
            with Store.open(root) as own:
                own.commit([new("child")])
            return "done"

        assert forked(close_and_open) == "done"
        assert [state.name for state in store.list()] == ["before", "child"]
        assert store.verify().problems == ()


class Waiting(RealFs):
    """A file system whose renames wait."""

    def __init__(self) -> None:
        self.inside, self.go = threading.Event(), threading.Event()

    def rename(self, source: Path, target: Path) -> None:
        self.inside.set()
        self.go.wait(10.0)
        super().rename(source, target)


@needs_fork
@with_threads
def test_a_child_forked_during_a_commit_does_not_keep_the_store_locked(tmp_path):
    """A data loader's worker, for example: it inherits the open lock file and lives on."""
    files = Waiting()
    with Store.open(tmp_path / "store", fs=files) as store:
        committing = threading.Thread(target=store.commit, args=([new("a", bytes(100_000))],))
        committing.start()
        files.inside.wait(10.0)
        with child_that_lives_on():
            files.go.set()
            committing.join()
            with Store.open(tmp_path / "store", lock_timeout_s=0.5) as other:
                assert other.commit([new("b")]).number == 2


class Slow(RealFs):
    """A file system on which a content takes long to read, until somebody has committed."""

    def __init__(self) -> None:
        self.read_one, self.committed, self.waited = threading.Event(), threading.Event(), []

    def open(self, path: Path) -> int:
        self.waited.append(self.read_one.is_set() and self.committed.wait(1.0))
        self.read_one.set()
        return super().open(path)


def beside(
    root: Path, act: Callable[[Store], object], contents: int, kind: type[Store] = Store
) -> tuple[list[bool], VerifyReport]:
    """Verifies a store while another acts: whether a content waited for that, and the report."""
    files = Slow()
    with kind.open(root, fs=files) as store, Store.open(root, lock_timeout_s=30.0) as other:
        for number in range(contents):
            store.commit([new(str(number), bytes([number]) * 100_000)])
            store.remove("phase5", str(number))

        def acts() -> None:
            files.read_one.wait(10.0)
            act(other)
            files.committed.set()

        acting = threading.Thread(target=acts)
        files.waited.clear()
        files.read_one.clear()
        acting.start()
        report = store.verify()
        acting.join()
    return files.waited, report


def test_a_commit_does_not_wait_for_a_verification_to_end(tmp_path, monkeypatch):
    """Training that kept its checkpoints in a large store died of it: locked for over 10 s."""
    monkeypatch.setattr(lock, "TURN_S", 0.0)
    waited, report = beside(tmp_path / "store", lambda other: other.commit([new("x")]), 5)
    assert any(waited)
    assert (report.ok, report.contents, report.orphans) == (True, 5, 0)


def test_what_is_collected_during_a_verification_is_no_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TURN_S", 0.0)
    root = tmp_path / "store"
    _, report = beside(root, lambda other: other.collect(retain=1, grace_s=0.0), 5)
    assert report.problems == ()
    assert report.collected >= 1
    assert report.collected + report.contents == 5


class Frozen(Store):
    """A store whose index is read as on a disk that cannot be written."""

    def make_index(self, *, read_only: bool) -> Index:
        index = super().make_index(read_only=read_only)
        index.is_frozen = read_only
        return index


def test_an_index_that_follows_no_commits_is_verified_under_one_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TURN_S", 0.0)
    root = tmp_path / "store"
    waited, report = beside(root, lambda other: other.collect(retain=1, grace_s=0.0), 2, Frozen)
    assert waited == [False, False]
    assert (report.problems, report.collected) == ((), 0)


class Chunked(RealFs):
    """A file system on which somebody acts after the first chunk of a content was read."""

    def __init__(self) -> None:
        self.act: Callable[[], object] | None = None

    def read(self, handle: int, size: int) -> bytes:
        found = super().read(handle, size)
        if self.act is not None:
            act, self.act = self.act, None
            act()
        return found


LARGE = bytes(range(256)) * (9 << 12)
"""Of three chunks."""


@pytest.mark.parametrize(
    "reading",
    [
        lambda store, state, path: store.read(state),
        lambda store, state, path: store.copy_to(state, "data", path),
        lambda store, state, path: store.verify().ok or pytest.fail("not ok"),
        lambda store, state, path: store.commit([moved(state)]),
        lambda store, state, path: store.commit([new("large", LARGE)]),
    ],
    ids=["read", "copy_to", "verify", "commit of the same", "commit of as much"],
)
def test_a_commit_does_not_wait_until_a_large_content_was_read(reading, tmp_path, monkeypatch):
    """One of several GB takes longer to read than the 10 s for which a commit waits."""
    monkeypatch.setattr(lock, "TURN_S", 0.0)
    files, root = Chunked(), tmp_path / "store"
    with Store.open(root, fs=files) as store, Store.open(root, lock_timeout_s=0.0) as other:
        store.commit([new("large", LARGE)])
        state = store.get("phase5", "large")
        # Two chunks later: the lock is let go of between them.
        files.act = lambda: setattr(files, "act", lambda: other.commit([new("small")]))
        reading(store, state, tmp_path / "copy")
        assert {state.name for state in store.list()} >= {"large", "small"}


def moved(state: State) -> NewState:
    return NewState(phase="phase6", kind="checkpoint", name="moved", files=state.files)


@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(b"x"), Path.unlink])
def test_what_was_damaged_after_it_was_seen_whole_is_not_committed(harm, tmp_path, monkeypatch):
    look = Contents.look

    def look_and_harm(self, prepared, reading):
        look(self, prepared, reading)
        assert prepared.seen
        harm(content)

    with Store.open(tmp_path / "store") as store:
        store.commit([new("large", LARGE)])
        (content,) = (tmp_path / "store" / "objects").glob("*/*")
        monkeypatch.setattr(Contents, "look", look_and_harm)
        with pytest.raises(DamagedStateError):
            store.commit([moved(store.get("phase5", "large"))])
        assert [state.name for state in store.list()] == ["large"]


@pytest.mark.parametrize("mended", [False, True])
def test_what_is_damaged_in_a_large_content_is_set_aside_and_nothing_else(
    mended, tmp_path, monkeypatch
):
    """The lock was let go of while it was read, and a commit may have put a whole one there."""
    monkeypatch.setattr(lock, "TURN_S", 0.0)
    files, root = Chunked(), tmp_path / "store"
    with Store.open(root, fs=files) as store, Store.open(root, lock_timeout_s=0.0) as other:
        store.commit([new("large", LARGE)])
        (content,) = (root / "objects").glob("*/*")
        with content.open("r+b") as stream:
            stream.seek(-1, 2)
            stream.write(b"x")
        if mended:
            again = lambda: other.commit([new("large", LARGE)])  # noqa: E731
            files.act = lambda: setattr(files, "act", again)
        with pytest.raises(DamagedStateError, match="is damaged: its SHA-256"):
            store.read(store.get("phase5", "large"))
        assert content.exists() is mended
        assert len(list((root / "quarantine").iterdir())) == 1
        if mended:
            assert store.read(store.get("phase5", "large")) == LARGE
