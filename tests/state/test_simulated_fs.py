"""The protocol of contents, in every state a power cut may leave: any operation, any survivors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from forge_harness.canonical import sha256_hex
from forge_harness.drill.store_mutants import _NoAdoptSync, _TrustsOrphans
from forge_harness.state.blobs import Blobs
from forge_harness.state.simulated_fs import PowerCut, SimulatedFs

ROOT = Path("/store")
CONTENTS = [b"a" * 10, b"b" * 1300, b"a" * 10, b"", b"c" * 513, b"d" * 700]
LEFT = {sha256_hex(b"d" * 700): b"d" * 700, sha256_hex(b"b" * 1300): b"B" * 1300}
"""What somebody left under the name of a content: whole and not synced, and damaged and synced."""


class NoFileSync(Blobs):
    def sync(self, handle: int) -> None:
        pass


class NoNameSync(Blobs):
    def sync_names(self, directory: Path) -> None:
        pass


def leave(fs: SimulatedFs, blobs: Blobs) -> None:
    for name, content in LEFT.items():
        path = blobs.path(name)
        if fs.exists(path):
            continue
        if not fs.exists(path.parent):
            fs.mkdir(path.parent)
        handle = fs.create(path)
        fs.write(handle, memoryview(content))
        if sha256_hex(content) != name:
            fs.fsync(handle)
        fs.close(handle)


def opened(fs: SimulatedFs, kind: type[Blobs]) -> Blobs:
    return kind(ROOT, fs)


def put_all(fs: SimulatedFs, kind: type[Blobs]) -> list[str]:
    """Puts every content; returns the digests that were acknowledged before the power went."""
    acknowledged: list[str] = []
    blobs = opened(fs, kind)
    try:
        blobs.create()
        fs.fsync_dir(ROOT)
        leave(fs, blobs)
        for content in CONTENTS:
            blobs.publish([blobs.stage(content)])
            acknowledged.append(sha256_hex(content))
    except PowerCut:
        pass
    return acknowledged


def broken(kind: type[Blobs], cut: int, choices: Sequence[int]) -> str | None:
    """What is wrong after one cut, or None."""
    fs = SimulatedFs(cut)
    fs.make_root(ROOT)
    acknowledged = put_all(fs, kind)
    rest = iter(choices)
    after = fs.after_power_cut(lambda most: min(most, next(rest, 0)))
    blobs = opened(after, kind)
    for digest in acknowledged:
        if blobs.stored_size(digest) is None:
            return f"{digest[:8]} was acknowledged and is gone"
    for name in blobs.names():
        if name in LEFT and name not in acknowledged:
            continue
        if blobs.stored_digest(name) != name:
            return f"{name[:8]} has its name and another content"
    # What is found is not in the way of going on.
    if put_all(after, kind) != [sha256_hex(content) for content in CONTENTS]:
        return "it does not go on"
    return None


def operations(kind: type[Blobs]) -> int:
    fs = SimulatedFs()
    fs.make_root(ROOT)
    put_all(fs, kind)
    return fs.operations


cuts = st.integers(0, operations(Blobs))
choices = st.lists(st.integers(0, 1), max_size=40)


@settings(max_examples=3000)
@given(cuts, choices)
def test_what_was_acknowledged_is_there_and_a_name_is_whole(cut: int, survived: list[int]) -> None:
    assert broken(Blobs, cut, survived) is None


def test_every_cut_with_nothing_everything_and_every_other_thing_surviving() -> None:
    for cut in range(operations(Blobs) + 1):
        for survived in ([], [1] * 100, [0, 1] * 50, [1, 0] * 50, [1, 1, 0] * 30):
            assert broken(Blobs, cut, survived) is None


@pytest.mark.parametrize("kind", [NoFileSync, NoNameSync, _NoAdoptSync, _TrustsOrphans])
def test_a_seeded_bug_is_found(kind: type[Blobs]) -> None:
    strategy = st.tuples(st.integers(0, operations(kind)), choices)
    try:
        find(strategy, lambda drawn: broken(kind, *drawn) is not None)
    except NoSuchExample:
        pytest.fail(f"{kind.__name__} was not found out")


def test_operations_of_the_model() -> None:
    fs = SimulatedFs()
    fs.make_root(ROOT)
    handle = fs.create(ROOT / "a")
    fs.write(handle, memoryview(b"12"))
    with pytest.raises(FileExistsError):
        fs.create(ROOT / "a")
    with pytest.raises(FileNotFoundError):
        fs.create(ROOT / "no" / "a")
    with pytest.raises(FileNotFoundError):
        fs.rename(ROOT / "b", ROOT / "c")
    assert fs.after_power_cut(lambda _: 0).names(ROOT) == []
    everything = fs.after_power_cut(lambda most: most)
    assert everything.size(ROOT / "a") == 2
    fs.fsync_dir(ROOT)
    nothing = fs.after_power_cut(lambda _: 0)
    assert nothing.size(ROOT / "a") == 0
    fs.fsync(handle)
    fs.rename(ROOT / "a", ROOT / "b")
    assert fs.after_power_cut(lambda _: 0).names(ROOT) == ["a"]
    assert fs.after_power_cut(lambda most: most).names(ROOT) == ["b"]
    fs.unlink(ROOT / "b")
    fs.fsync_dir(ROOT)
    assert fs.after_power_cut(lambda _: 0).names(ROOT) == []
