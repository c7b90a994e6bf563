from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from forge_harness.durable import (
    exclusive,
    identity_of,
    read_plain,
    remove_partials,
    staged_directory,
    staged_file,
    write_durably,
)

OLD, NEW = {"a": b"old", "b": b"old"}, {"a": b"new", "deep/c": b"new"}


def content(path: Path) -> dict[str, bytes] | None:
    """Every file below a directory, or None where there is none."""
    if not path.exists():
        return None
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def fill(directory: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)


def entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


class Failing:
    """Lets `after` calls through and fails every one that follows."""

    def __init__(self, function: Callable[..., object], after: int, *, once: bool = False) -> None:
        self.function, self.after, self.once, self.calls = function, after, once, 0

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.calls += 1
        if self.calls == self.after + 1 or (self.calls > self.after and not self.once):
            raise OSError(28, "No space left on device")
        return self.function(*args, **kwargs)


def failing(
    monkeypatch: pytest.MonkeyPatch, name: str, after: int, *, once: bool = False
) -> Failing:
    fault = Failing(getattr(os, name), after, once=once)
    monkeypatch.setattr(os, name, fault)
    return fault


def write_new_file(path: Path) -> None:
    with staged_file(path) as partial:
        partial.write_bytes(b"new")


def write_new_directory(path: Path, *, replace: bool = False) -> None:
    with staged_directory(path, replace=replace) as stage:
        fill(stage, NEW)


def write_half_a_file(path: Path, error: type[BaseException]) -> None:
    with staged_file(path) as partial:
        partial.write_bytes(b"half")
        raise error


def write_half_a_directory(path: Path, error: type[BaseException], *, replace: bool) -> None:
    with staged_directory(path, replace=replace) as stage:
        fill(stage, NEW)
        raise error


# Files


def test_file_appears_whole_in_a_directory_that_was_not_there(tmp_path: Path) -> None:
    with staged_file(tmp_path / "made/file") as partial:
        partial.write_bytes(b"new")
        assert not (tmp_path / "made/file").exists()
    assert (tmp_path / "made/file").read_bytes() == b"new"
    assert entries(tmp_path / "made") == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_file_of_a_block_that_raises_is_not_there(
    tmp_path: Path, error: type[BaseException]
) -> None:
    write_durably(tmp_path / "file", b"old")
    for name in ("file", "other"):
        with pytest.raises(error):
            write_half_a_file(tmp_path / name, error)
    assert content(tmp_path) == {"file": b"old"}


def test_block_that_writes_nothing_leaves_the_old_file(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", b"old")
    with pytest.raises(FileNotFoundError), staged_file(tmp_path / "file"):
        pass
    assert content(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("function", ["fsync", "replace", "open"])
def test_file_is_whole_or_absent_wherever_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, old: bool
) -> None:
    before = {"file": b"old"} if old else {}
    for after in range(10):
        path = tmp_path / str(after) / "file"
        path.parent.mkdir()
        fill(path.parent, before)
        with monkeypatch.context() as patch:
            fault = failing(patch, function, after)
            try:
                write_new_file(path)
            except OSError:
                pass
            else:
                break
        # After the rename only the directory's own flush can fail: the file is there, and whole.
        renamed = fault.calls == after + 1 and after == 1 and function != "replace"
        assert content(path.parent) == ({"file": b"new"} if renamed else before)
    assert after == {"fsync": 2, "replace": 1, "open": 2}[function]
    assert content(path.parent) == {"file": b"new"}


def test_directory_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_new_file(tmp_path / "file")
    assert entries(tmp_path) == ["file"]


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and renamed, in order: names of files, directories with a slash."""
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append(os.path.basename(path) + "/" * os.path.isdir(path))
        sync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append(f"rename to {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return calls


def test_file_and_directory_are_synced_around_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = noted(monkeypatch)
    write_durably(tmp_path / "file", b"content")
    assert re.fullmatch(rf"\.file\.{os.getpid()}-\w+\.partial", calls[0])
    assert calls[1:] == ["rename to file", f"{tmp_path.name}/"]


# Directories


def test_directory_appears_whole(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "made/target") as stage:
        assert entries(stage) == []
        fill(stage, NEW)
        assert not (tmp_path / "made/target").exists()
    assert content(tmp_path / "made/target") == NEW
    assert entries(tmp_path / "made") == ["target"]


def test_everything_is_flushed_before_the_rename_and_the_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = noted(monkeypatch)
    write_new_directory(tmp_path / "target")
    flushed = sorted(calls[:-2])
    assert re.fullmatch(rf"\.target\.{os.getpid()}-\w+\.partial/", flushed.pop(0))
    assert flushed == ["a", "c", "deep/"]
    assert calls[-2:] == ["rename to target", f"{tmp_path.name}/"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_directory_of_a_block_that_raises_is_not_there(
    tmp_path: Path, error: type[BaseException], replace: bool
) -> None:
    fill(tmp_path / "old", OLD)
    for name in ("old", "other")[not replace :]:
        with pytest.raises(error):
            write_half_a_directory(tmp_path / name, error, replace=replace)
    assert entries(tmp_path) == ["old"]
    assert content(tmp_path / "old") == OLD


@pytest.mark.parametrize(
    ("function", "replace"),
    [("fsync", False), ("fsync", True), ("replace", False), ("replace", True), ("open", False)],
)
def test_directory_is_whole_or_absent_wherever_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, replace: bool
) -> None:
    for after in range(20):
        root = tmp_path / str(after)
        root.mkdir()
        if replace:
            fill(root / "target", OLD)
        with monkeypatch.context() as patch:
            # Once: a disk that takes the rename back is what restores the old directory.
            failing(patch, function, after, once=True)
            try:
                write_new_directory(root / "target", replace=replace)
            except OSError:
                assert content(root / "target") in ([OLD, NEW] if replace else [None, NEW])
                assert entries(root) in ([], ["target"])
            else:
                break
    # Two files, two directories and the parent are flushed, each opened first.
    assert after >= {"fsync": 5, "replace": 1 + replace, "open": 5}[function]
    assert content(root / "target") == NEW
    assert entries(root) == ["target"]


def test_replaced_directory_keeps_nothing_of_the_old(tmp_path: Path) -> None:
    fill(tmp_path / "target", OLD)
    write_new_directory(tmp_path / "target", replace=True)
    assert content(tmp_path / "target") == NEW
    assert entries(tmp_path) == ["target"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_replaced_file_or_link_leaves_nothing_behind(tmp_path: Path, kind: str) -> None:
    fill(tmp_path / "elsewhere", OLD)
    if kind == "file":
        (tmp_path / "target").write_bytes(b"old")
    else:
        (tmp_path / "target").symlink_to("elsewhere")
    write_new_directory(tmp_path / "target", replace=True)
    assert content(tmp_path / "target") == NEW
    assert content(tmp_path / "elsewhere") == OLD
    assert entries(tmp_path) == ["elsewhere", "target"]


def test_empty_directory_gives_way(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    write_new_directory(tmp_path / "target")
    assert content(tmp_path / "target") == NEW


@pytest.mark.parametrize("kind", ["directory", "file", "link", "dangling"])
def test_existing_target_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "directory":
        fill(target, OLD)
    elif kind == "file":
        target.write_bytes(b"old")
    else:
        (tmp_path / "empty").mkdir()
        target.symlink_to("empty" if kind == "link" else "nowhere")
    before = entries(tmp_path)
    with pytest.raises(FileExistsError, match="target"):
        write_new_directory(target)
    assert entries(tmp_path) == before
    if kind == "directory":
        assert content(target) == OLD


def test_target_filled_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    stage = staged_directory(tmp_path / "target")
    fill(stage.__enter__(), NEW)
    fill(tmp_path / "target", OLD)
    with pytest.raises(OSError, match="not empty"):
        stage.__exit__(None, None, None)
    assert content(tmp_path / "target") == OLD
    assert entries(tmp_path) == ["target"]


def test_remains_of_a_killed_process_are_no_part_of_the_next(tmp_path: Path) -> None:
    fill(tmp_path / f".target.{os.getpid()}.partial", {"stale": b"half"})
    write_new_directory(tmp_path / "target")
    assert content(tmp_path / "target") == NEW


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path, order = tmp_path / "file", []
    inside = threading.Event()

    def second() -> None:
        inside.wait(10)
        with exclusive(path):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with exclusive(path):
        inside.set()
        thread.join(0.3)
        # Replacing the file changes nothing for who waits.
        write_durably(path, b"new")
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


@pytest.mark.parametrize("name", ["n" * 255, "\u00e4" * 127, "n" * 230 + "\u20ac" * 8])
def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path: Path, name: str) -> None:
    """The temporary name was longer than the one that was asked for, and none was possible."""
    write_durably(tmp_path / name, b"new")
    assert (tmp_path / name).read_bytes() == b"new"
    with staged_directory(tmp_path / f"d{name[1:]}") as stage:
        fill(stage, NEW)
    with staged_directory(tmp_path / f"d{name[1:]}", replace=True) as stage:
        fill(stage, OLD)
    assert content(tmp_path / f"d{name[1:]}") == OLD
    assert entries(tmp_path) == sorted([name, f"d{name[1:]}"])
    (tmp_path / f".{name[:100]}.1-00000000.partial").write_bytes(b"left by a kill")
    remove_partials(tmp_path)
    assert entries(tmp_path) == sorted([name, f"d{name[1:]}"])


def test_a_full_disk_is_said_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several files that a command writes, nobody knew which."""
    failing(monkeypatch, "fsync", 0)
    with pytest.raises(OSError, match="No space left") as caught:
        write_durably(tmp_path / "file", b"new")
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "file"))


@pytest.mark.parametrize("write", [lambda p: write_durably(p, b""), write_new_directory])
def test_a_file_where_a_directory_should_be_is_named(tmp_path: Path, write) -> None:
    """It was said to exist already: "name something that does not exist yet"."""
    (tmp_path / "file").write_bytes(b"kept")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "deeper" / "x"):
        with pytest.raises(NotADirectoryError):
            write(path)
        with pytest.raises(NotADirectoryError), exclusive(path):
            pass
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_threads_of_one_process_do_not_disturb_each_other(tmp_path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(8)]
    start = threading.Barrier(len(contents))

    def write(data: bytes) -> None:
        start.wait(30)
        for _ in range(8):
            write_durably(tmp_path / "file", data)
            with staged_directory(tmp_path / f"tree-{data[0]}", replace=True) as stage:
                fill(stage, {"a": data})
            # Torn: not one of the contents, whole.
            assert (tmp_path / "file").read_bytes() in contents

    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(write, contents))
    assert not [name for name in entries(tmp_path) if name.startswith(".")]


def test_what_is_no_plain_file_is_refused_by_name_and_closed_again(tmp_path: Path) -> None:
    """A directory was named by the number of its descriptor, which stayed open."""
    os.mkfifo(tmp_path / "pipe")
    before = set(os.listdir("/dev/fd"))
    for path, refusal in ((tmp_path, IsADirectoryError), (tmp_path / "pipe", OSError)):
        with pytest.raises(refusal) as caught:
            read_plain(path)
        assert caught.value.filename == str(path)
    assert set(os.listdir("/dev/fd")) == before
    (tmp_path / "file").write_bytes(b"content")
    assert read_plain(tmp_path / "file") == b"content"


def test_a_file_that_takes_anothers_name_is_told_from_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert identity_of(path) is None
    path.write_bytes(b"x")
    first = identity_of(path)
    path.write_bytes(b"y")
    assert identity_of(path) == first
    path.rename(tmp_path / "b")
    path.write_bytes(b"y")
    assert identity_of(path) != first == identity_of(tmp_path / "b")
