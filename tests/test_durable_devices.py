"""What is no plain file is written to and never replaced: a pipe, a device, /dev/stdout."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from forge_harness.durable import staged_directory, staged_file, write_durably

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")

LARGE = os.urandom(300_000)
"""More than a pipe holds: it must be written in parts."""


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_gets_the_content_and_stays_a_pipe(tmp_path: Path, linked: bool) -> None:
    pipe = path = tmp_path / "pipe"
    os.mkfifo(pipe)
    if linked:
        path = tmp_path / "link"
        path.symlink_to(pipe)
    before, found = names(tmp_path), []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_durably(path, LARGE)
    reader.join(10)
    assert found == [LARGE]
    assert pipe.is_fifo()
    assert names(tmp_path) == before


def test_a_block_that_raises_writes_nothing_to_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(ValueError), staged_file(tmp_path / "pipe") as partial:  # noqa: PT011, PT012
        partial.write_bytes(b"half")
        raise ValueError
    assert os.read(reader, 10) == b""
    os.close(reader)
    assert names(tmp_path) == ["pipe"]


def test_a_terminal_gets_the_content() -> None:
    ours, theirs = os.openpty()
    write_durably(Path(os.ttyname(theirs)), b"said\n")
    assert os.read(ours, 100) == b"said\r\n"
    assert stat.S_ISCHR(os.stat(os.ttyname(theirs)).st_mode)
    os.close(ours)
    os.close(theirs)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
@pytest.mark.parametrize("linked", [False, True])
def test_a_device_is_still_one(tmp_path: Path, linked: bool) -> None:
    """As root, an option that was given /dev/null took it away from the whole machine."""
    device = path = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_bytes(b"")
    except OSError as error:
        pytest.skip(f"no devices here: {error}")
    if linked:
        path = tmp_path / "link"
        path.symlink_to(device)
    write_durably(path, b"gone")
    with pytest.raises(FileExistsError), staged_directory(path, replace=True):
        pass
    assert stat.S_ISCHR(device.lstat().st_mode)
    assert names(tmp_path) == sorted({"null", path.name})


WRITES = """
import sys
from pathlib import Path
from forge_harness.durable import write_durably
print("before", flush=True)
write_durably(Path(sys.argv[1]), b"content\\n")
print("after", flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("to_file", [False, True])
@pytest.mark.parametrize("target", ["/proc/self/fd/1", "/dev/fd/1", "stdout"])
def test_a_name_of_an_open_file_is_written_where_that_stands(
    tmp_path: Path, target: str, to_file: bool
) -> None:
    """As /dev/stdout: what was printed before comes before, and after after, also in a file."""
    link = tmp_path / "stdout"
    link.symlink_to("/proc/self/fd/1")
    command = [sys.executable, "-c", WRITES, str(link if target == "stdout" else target)]
    if to_file:
        with (tmp_path / "out").open("wb") as stream:
            subprocess.run(command, stdout=stream, check=True, timeout=60)
        said = (tmp_path / "out").read_bytes()
    else:
        said = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout
    assert said == b"before\ncontent\nafter\n"
    assert link.is_symlink()
    assert names(tmp_path) == (["out", "stdout"] if to_file else ["stdout"])


def test_a_pipe_nobody_reads_any_more_is_an_error_of_the_system(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    closing = threading.Timer(0.3, os.close, (reader,))
    closing.start()
    with pytest.raises(OSError) as caught:  # noqa: PT011
        write_durably(tmp_path / "pipe", LARGE)
    assert caught.value.errno == errno.EPIPE
    closing.join()


def test_a_link_to_a_plain_file_gives_way_as_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    write_durably(tmp_path / "link", b"new")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"old"
