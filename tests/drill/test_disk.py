"""What a power cut may leave, for calls whose outcome can be said in advance."""

import random

import pytest

from forge_harness.drill import strace
from forge_harness.drill.disk import Disk
from forge_harness.drill.tally import NotMeasured

from .traces import moved, opened, synced, written


def left(tmp_path, lines, survives="nothing", before=None, seed=0):
    """Returns name -> content after a cut that follows these calls."""
    content, target = tmp_path / "before", tmp_path / f"after {survives} {seed}"
    for directory in (content, target):
        directory.mkdir(exist_ok=True)
    for name, data in (before or {}).items():
        (content / name).write_bytes(data)
    disk = Disk(content, tmp_path / "store")
    for call in strace.parse("\n".join(lines)):
        disk.apply(call)
    disk.write(target, survives, random.Random(seed))
    return {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}


@pytest.fixture
def store(tmp_path):
    return (tmp_path / "store").resolve()


def replaced(store, *, file_sync=True, name_sync=True):
    lines = [opened(store / "t", 3), written(store / "t", 3, b"new")]
    lines += [synced(store / "t", 3)] if file_sync else []
    lines += [moved(store / "t", store / "a")]
    return lines + ([synced(store, 4)] if name_sync else [])


def test_file_and_name_synced_are_there(tmp_path, store):
    assert left(tmp_path, replaced(store), before={"a": b"old"}) == {"a": b"new"}


def test_a_name_that_was_not_synced_is_the_old_one(tmp_path, store):
    lines = replaced(store, name_sync=False)
    assert left(tmp_path, lines, before={"a": b"old"}) == {"a": b"old"}


def test_a_file_that_was_not_synced_is_empty_under_its_new_name(tmp_path, store):
    lines = replaced(store, file_sync=False)
    assert left(tmp_path, lines, before={"a": b"old"}) == {"a": b""}


@pytest.mark.parametrize("seed", range(20))
def test_a_rename_happens_whole_or_not_at_all(tmp_path, store, seed):
    lines = [opened(store / "t", 3), synced(store, 4), moved(store / "t", store / "a")]
    assert set(left(tmp_path, lines, "some", seed=seed)) in ({"t"}, {"a"})


def test_everything_survives_when_it_does(tmp_path, store):
    lines = replaced(store, file_sync=False, name_sync=False)
    assert left(tmp_path, lines, "everything", before={"a": b"old"}) == {"a": b"new"}


def test_a_failed_sync_is_not_made_good_by_the_next(tmp_path, store):
    failing = [opened(store / "t", 3), synced(store, 4), written(store / "t", 3, b"new")]
    failing += [synced(store / "t", 3, "-1 EIO (Input/output error) (INJECTED)")]
    assert left(tmp_path, [*failing, synced(store / "t", 3)]) == {"t": b""}


def test_writes_are_torn_in_sectors(tmp_path, store):
    lines = [written(store / "a", 3, b"n" * 2048, "pwrite64", at=0)]
    seen = {
        tuple(
            left(tmp_path, lines, "some", before={"a": b"o" * 2048}, seed=s)["a"][i : i + 1]
            for i in range(0, 2048, 512)
        )
        for s in range(60)
    }
    assert (b"n",) * 4 in seen
    assert (b"o",) * 4 in seen
    assert len(seen) > 4


def test_a_call_it_does_not_know_is_not_guessed(tmp_path, store):
    line = f"7 fallocate({opened(store / 'a', 3).split(' = ')[1]}, 0, 0, 5) = 0"
    with pytest.raises(NotMeasured, match="fallocate"):
        left(tmp_path, [line], before={"a": b""})
