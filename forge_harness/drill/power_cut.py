"""Campaign `power_cut`: a file system that forgets everything it was not told to keep.

EXT4_IOC_SHUTDOWN with NOLOGFLUSH stops an ext4 at once without writing its journal: what is on the
loop device then is what a disk holds after the power went. It needs root and loop devices.

Acknowledgements are read up to the moment *before* the cut. One that arrives later may have been
made after it, so its commit is in doubt and not acknowledged.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forge_harness.drill import children, scenes, workload
from forge_harness.drill.children import Session, session_of
from forge_harness.drill.judge import judge
from forge_harness.drill.tally import Finding, NotMeasured, Result, Tally
from forge_harness.drill.target import open_store

SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN, linux/fs/ext4/ext4.h."""
NOLOGFLUSH = 2
_IMAGE_BYTES = 64 << 20
_BEFORE_CUT_S = (0.02, 0.35)
"""Range the time from the first acknowledgement to the cut is drawn from."""
_FIRST_ACK_S = 20.0
_ROUNDS = 100_000
"""More than any trial lasts for."""

Step = Callable[[int, int, str], None]


def cut_power(tally: Tally, opener: str, *, trials: int, shape: str, tell: Step) -> None:
    """Cuts the power on a committing writer, mounts the disk again and counts what is there.

    Args:
        tally: Takes the findings.
        opener: What opens the store.
        trials: Power cuts.
        shape: Workload.
        tell: Progress.

    Raises:
        NotMeasured: Without root, loop devices, ext4 or the ioctl.
    """
    _require()
    generator = random.Random(tally.seed)
    with scenes.workspace() as workspace:
        for index in range(trials):
            delay = generator.uniform(*_BEFORE_CUT_S)
            finding = _trial(workspace, opener, delay, tally.seed + index, shape)
            tally.add(
                finding, where=f"cut {index + 1}, {1e3 * delay:.0f} ms after the first commit"
            )
            tell(index + 1, trials, "power cut")


def _require() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NotMeasured("cutting the power of a loop device needs root on Linux")
    for program in ("mkfs.ext4", "mount", "umount", "losetup"):
        if shutil.which(program) is None:
            raise NotMeasured(f"{program} is not installed")
    with scenes.workspace() as workspace:
        disk = LoopDisk(workspace)
        with disk.mounted() as mount:
            disk.cut(mount)


@dataclass(slots=True)
class LoopDisk:
    """An ext4 in a file, made new when the object is."""

    workspace: Path

    def __post_init__(self) -> None:
        with self._image.open("wb") as stream:
            stream.truncate(_IMAGE_BYTES)
        _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", str(self._image))

    @property
    def _image(self) -> Path:
        return self.workspace / "disk.img"

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """Mounts the disk, replaying its journal, and unmounts it when the block ends.

        Raises:
            NotMeasured: It cannot be mounted here.
        """
        point = self.workspace / "mounted"
        point.mkdir(exist_ok=True)
        # The kernel must not commit the journal of its own accord: only what was synced counts.
        _run("mount", "-o", "loop,commit=3600", str(self._image), str(point))
        try:
            yield point
        finally:
            for _ in range(50):
                done = subprocess.run(["umount", str(point)], capture_output=True, check=False)
                if done.returncode == 0:
                    break
                time.sleep(0.02)

    def cut(self, mount: Path) -> None:
        """Cuts the power.

        Raises:
            NotMeasured: The kernel does not know the ioctl.
        """
        handle = os.open(mount, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, SHUTDOWN, struct.pack("I", NOLOGFLUSH))
        except OSError as error:
            raise NotMeasured(f"ext4 does not shut down on request: {error.strerror}") from error
        finally:
            os.close(handle)


def _trial(workspace: Path, opener: str, delay_s: float, seed: int, shape: str) -> Finding:
    disk = LoopDisk(workspace)
    with disk.mounted() as mount:
        root = mount / "store"
        with open_store(opener, root) as store:
            store.commit(workload.states(seed, 0, shape), note="round 0")
        os.sync()
        session = _write_until_cut(disk, mount, root, opener, delay_s, seed, shape)
    if not session.acked:
        return Finding(result=Result.UNRECOVERABLE, message=f"no commit: {session.errors}")
    with disk.mounted() as mount:
        return judge(opener, mount / "store", session, seed=seed, shape=shape)


def _write_until_cut(
    disk: LoopDisk, mount: Path, root: Path, opener: str, delay_s: float, seed: int, shape: str
) -> Session:
    command = children.writer(root, opener, seed=seed, rounds=_ROUNDS, shape=shape)
    with children.killed_at_end(command) as child:
        assert child.stdout is not None
        try:
            output = _until_ack(child.stdout.fileno())
            time.sleep(delay_s)
            os.set_blocking(child.stdout.fileno(), False)
            output += _drain(child.stdout.fileno())
            disk.cut(mount)
        finally:
            child.send_signal(signal.SIGKILL)
        acknowledged = session_of(output)
        os.set_blocking(child.stdout.fileno(), True)
        late = session_of(output + child.stdout.read())
        child.wait()
    # Begun is begun, whenever it was said; acknowledged is only what was read before the cut.
    return Session(acknowledged.base, late.begun, acknowledged.acked, acknowledged.errors)


def _until_ack(descriptor: int) -> bytes:
    output, deadline = b"", time.monotonic() + _FIRST_ACK_S
    while b"\nack" not in output and time.monotonic() < deadline:
        part = os.read(descriptor, 1 << 16)
        if not part:
            break
        output += part
    return output


def _drain(descriptor: int) -> bytes:
    output = b""
    while True:
        try:
            part = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return output
        if not part:
            return output
        output += part


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise NotMeasured(f"{command[0]} fails here: {why}")
