"""What a collection must not take for garbage when the index is damaged."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_harness.errors import DamagedStateError, StateError
from forge_harness.security.keys import Keyring
from forge_harness.security.sealing import KeyringSealer
from forge_harness.state import NewState, RealFs, Store

LARGE = bytes(100_000)


def files(root: Path) -> list[Path]:
    return [path for path in (root / "objects").rglob("*") if path.is_file()]


@contextlib.contextmanager
def row_of(root: Path) -> Iterator[dict[str, str]]:
    """Yields the digest and stored name of the only content, to be changed behind the store."""
    with contextlib.closing(sqlite3.connect(root / "index.db")) as index:
        digest, stored = index.execute("SELECT digest, stored FROM object").fetchone()
        row = {"digest": digest, "stored": stored}
        yield row
        index.execute("UPDATE object SET digest = ?, stored = ?", (row["digest"], row["stored"]))
        index.commit()


def flipped(digest: str) -> str:
    return ("1" if digest[0] == "0" else "0") + digest[1:]


@pytest.fixture(params=["sealed", "plain"])
def sealer(request):
    return KeyringSealer(Keyring.new()) if request.param == "sealed" else None


@pytest.mark.parametrize("column", ["digest", "stored"])
def test_a_content_whose_row_is_damaged_outlives_a_collection(tmp_path, sealer, column):
    root = tmp_path / "store"
    with Store.open(root, sealer=sealer) as store:
        store.commit([NewState(phase="p", kind="k", name="n", files={"data": LARGE})])
    with row_of(root) as row:
        right = dict(row)
        row[column] = flipped(row[column])
    with Store.open(root, sealer=sealer) as store:
        refused = sealer is not None and column == "digest"
        with pytest.raises(DamagedStateError) if refused else contextlib.nullcontext():
            store.collect(grace_s=0.0)
    assert len(files(root)) == 1
    if refused:
        with row_of(root) as row:
            row.update(right)
        with Store.open(root, sealer=sealer) as store:
            assert store.read(store.get("p", "n")) == LARGE


def test_what_no_retained_generation_has_is_collected_beside_a_damaged_row(tmp_path):
    """The way out: a content that is lost for good does not keep garbage forever."""
    root, sealer = tmp_path / "store", KeyringSealer(Keyring.new())
    with Store.open(root, sealer=sealer) as store:
        store.commit([NewState(phase="p", kind="k", name="n", files={"data": LARGE})])
        with row_of(root) as row:
            row["digest"] = flipped(row["digest"])
        store.commit([NewState(phase="p", kind="k", name="n", files={"data": b"x" * 100_000})])
        with pytest.raises(DamagedStateError, match="retain no generation that has the content"):
            store.collect(grace_s=0.0)
        assert store.collect(retain=1, grace_s=0.0).files_removed == 1
        assert store.read(store.get("p", "n")) == b"x" * 100_000


def test_what_a_clock_that_was_ahead_wrote_is_collected_without_grace(tmp_path, monkeypatch):
    """No option freed it until the clock came there."""
    with Store.open(tmp_path / "store") as store:
        with monkeypatch.context() as ahead:
            ahead.setattr(time, "time", lambda: 4e9)
            store.commit([NewState(phase="p", kind="k", name="n", files={"data": LARGE})])
        orphan = tmp_path / "store/tmp/1-left"
        orphan.write_bytes(b"by a kill")
        os.utime(orphan, (4e9, 4e9))
        store.commit([NewState(phase="p", kind="k", name="n", files={"data": b"x" * 100_000})])
        assert store.collect(retain=1).kept_by_grace == 2
        assert store.collect(retain=1, grace_s=0.0).files_removed == 2
        assert store.verify().ok


class CollectedBeside(RealFs):
    """A file system on which somebody collects without grace once a content is written."""

    def __init__(self, root: Path) -> None:
        self.root, self.done = root, False

    def close(self, handle: int) -> None:
        super().close(handle)
        if not self.done:
            self.done = True
            with Store.open(self.root) as store:
                store.collect(grace_s=0.0)


def test_a_commit_that_a_collection_took_the_contents_of_says_so(tmp_path):
    """It asked for free space and permissions."""
    root = tmp_path / "store"
    Store.open(root).close()
    with Store.open(root, fs=CollectedBeside(root)) as store:
        state = NewState(phase="p", kind="k", name="n", files={"data": LARGE})
        with pytest.raises(StateError, match="collection with too short a grace") as caught:
            store.commit([state])
        assert "Free space" not in str(caught.value)
        assert store.commit([state]).number == 1
        assert store.read(store.get("p", "n")) == LARGE


@pytest.mark.parametrize(
    "given",
    [
        {"retain": True},
        {"retain": 2.0},
        {"retain": 0},
        {"grace_s": -1.0},
        {"grace_s": float("nan")},
    ],
    ids=str,
)
def test_what_says_no_amount_frees_nothing(tmp_path, given):
    """`retain=True` freed every generation but the newest."""
    with Store.open(tmp_path / "store") as store:
        for content in (b"a", b"b"):
            store.commit(
                [NewState(phase="p", kind="k", name="n", files={"data": content * 99_999})]
            )
        with pytest.raises(StateError, match="expected"):
            store.collect(**{"grace_s": 0.0, **given})
        assert len(files(tmp_path / "store")) == 2
