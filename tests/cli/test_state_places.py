"""state: where a store cannot be written, or there is no room, what it holds can still be read."""

import contextlib
import json
import os
import shutil
import subprocess

import pytest

from forge_harness.errors import ExitCode
from forge_harness.state import NewState, Store


@contextlib.contextmanager
def memory_disk(point, size):
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a memory disk cannot be mounted here")
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)


@contextlib.contextmanager
def read_only(place):
    """A store nobody can write: on a read-only disk for root, who may write everywhere else."""
    if os.geteuid() != 0:
        (place / "store").mkdir(parents=True)
        fill(place / "store")
        for path in (*place.rglob("*"), place):
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            yield place / "store"
        finally:
            for path in (place, *place.rglob("*")):
                path.chmod(0o755)
        return
    with memory_disk(place, "8m"):
        fill(place / "store")
        remount = ["mount", "-o", "remount,ro", str(place)]
        subprocess.run(remount, check=True)
        yield place / "store"


def fill(root):
    with Store.open(root) as store:
        for name, content in (("small", b"x"), ("large", bytes(100_000))):
            store.commit(
                [NewState(phase="phase5", kind="weights", name=name, files={"w": content})]
            )


def test_a_store_nobody_can_write_is_read(tmp_path, invoke):
    """A backup on read-only media, or somebody else's store: even `ls` asked for free space."""
    with read_only(tmp_path / "disk") as root:
        listed = invoke("state", "ls", "--root", root, "--json")
        assert listed.exit_code == 0, listed.output
        assert [s["name"] for s in json.loads(listed.stdout)["states"]] == ["large", "small"]
        assert invoke("state", "show", "phase5", "large", "--root", root).exit_code == 0
        verified = invoke("state", "verify", "--root", root)
        assert (verified.exit_code, "nothing is wrong" in verified.stdout) == (0, True)
        words = ("state", "get", "phase5", "large", "--out", tmp_path / "got", "--root", root)
        assert invoke(*words).exit_code == 0
        assert (tmp_path / "got" / "w").read_bytes() == bytes(100_000)


@pytest.mark.parametrize(
    "words",
    [
        ("save", "file", "--phase", "5", "--kind", "weights", "--name", "m"),
        ("gc",),
        ("checkpoint", "a"),
        ("restore", "1"),
        ("migrate", "phase5", "small", "--to", "phase6"),
    ],
)
def test_a_change_of_a_store_nobody_can_write_names_the_remedy(
    tmp_path, invoke, monkeypatch, words
):
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    with read_only(tmp_path / "disk") as root:
        done = invoke("state", *words, "--root", root)
    assert done.exit_code == ExitCode.USAGE
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be written" in done.stderr
    assert "free space" not in done.stderr.lower()


def test_damage_on_a_read_only_disk_is_found_and_left_where_it_is(tmp_path, invoke):
    with memory_disk(tmp_path / "disk", "8m") as place:
        fill(place / "store")
        (victim,) = [p for p in (place / "store" / "objects").rglob("*") if p.is_file()]
        victim.write_bytes(b"y" * 100_000)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        words = ("state", "get", "phase5", "large", "--out", tmp_path / "got")
        done = invoke(*words, "--root", place / "store")
        assert done.exit_code == ExitCode.VERIFICATION_FAILED, done.stderr
        verified = invoke("state", "verify", "--root", place / "store")
        assert verified.exit_code == ExitCode.VERIFICATION_FAILED
        assert victim.exists()
    assert not (tmp_path / "got").exists()


def test_a_full_disk_can_be_looked_at(tmp_path, invoke):
    """Whoever wants to know what to free must see what is there."""
    with memory_disk(tmp_path / "disk", "1m") as place:
        fill(place / "store")
        with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as stream:
            while stream.write(bytes(4096)):
                pass
        listed = invoke("state", "ls", "--root", place / "store")
        assert (listed.exit_code, "large" in listed.stdout) == (0, True), listed.stderr
        assert invoke("state", "verify", "--root", place / "store").exit_code == 0
        saved = invoke(
            *("state", "save", tmp_path / "disk" / "filler", "--phase", "5", "--kind", "weights"),
            *("--name", "m", "--root", place / "store"),
        )
        assert saved.exit_code == ExitCode.USAGE
        assert "free space" in saved.stderr.lower()
        (place / "filler").unlink()
        assert invoke("state", "gc", "--root", place / "store").exit_code == 0


def test_a_copy_of_a_killed_store_on_a_read_only_disk_shows_its_log_too(tmp_path, invoke):
    root = tmp_path / "store"
    with Store.open(root) as store:
        store.commit([NewState(phase="p", kind="k", name="first", files={"d": b"1"})])
        store.commit([NewState(phase="p", kind="k", name="second", files={"d": b"2"})])
        assert (root / "index.db-wal").stat().st_size
        with memory_disk(tmp_path / "disk", "8m") as place:
            shutil.copytree(root, place / "store")
            (place / "store" / "index.db-shm").unlink()
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            listed = invoke("state", "ls", "--root", place / "store")
            assert (listed.exit_code, "second" in listed.stdout) == (0, True), listed.stderr


def test_a_disk_that_fills_up_while_the_store_is_timed_is_a_sentence(tmp_path, invoke):
    """It was an internal error: SQLite itself, which commits are timed against, met it first."""
    with memory_disk(tmp_path / "disk", "16k") as place:
        words = ("--blob-mib", "1", "--states", "10", "--rounds", "6", "--dir", place)
        done = invoke("bench", "store", *words)
        assert done.exit_code == ExitCode.USAGE, done.stderr
        assert "free space" in done.stderr.lower()
        assert list(place.iterdir()) == []
