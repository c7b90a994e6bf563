"""Campaigns `disk_full` and `file_limit`: no room, wherever it ends.

The store is created and written to on a memory disk of every size in a sweep, and under every limit
on the size of a file. Afterwards it is judged where there is room again.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from forge_harness.drill import children, scenes, workload
from forge_harness.drill.children import Session, session_of
from forge_harness.drill.judge import judge
from forge_harness.drill.scenes import Scene
from forge_harness.drill.tally import Finding, NotMeasured, Tally, hung
from forge_harness.drill.target import open_store

_FILLING = Scene(name="fill", base=-1, rounds=4)

Step = Callable[[int, int, str], None]


def fill_disks(tally: Tally, opener: str, *, kibibytes: Sequence[int], tell: Step) -> None:
    """Writes until a small disk is full, for each size, and judges what is there.

    Args:
        tally: Takes the findings.
        opener: What opens the store.
        kibibytes: Sizes of the disks.
        tell: Progress.

    Raises:
        NotMeasured: Memory disks cannot be mounted here.
    """
    tally.points = tally.points_tried = len(kibibytes)
    with scenes.workspace() as workspace:
        for index, size in enumerate(kibibytes):
            with _memory_disk(workspace / "disk", size) as disk:
                root = disk / "store"
                command = _FILLING.command(root, opener, tally.seed)
                finding = _filled(command, root, opener, workspace / "moved", tally)
            tally.add(finding, where=f"disk of {size} KiB")
            tell(index + 1, len(kibibytes), f"disk of {size} KiB")


def _filled(command: Sequence[str], root: Path, opener: str, moved: Path, tally: Tally) -> Finding:
    try:
        session = session_of(children.run(command)[1], base=-1)
    except TimeoutError as error:
        return hung(error)
    tally.details["commits refused"] += len(session.errors)
    tally.details["readable while full"] += _readable(opener, root, session, tally)
    shutil.rmtree(moved, ignore_errors=True)
    shutil.copytree(root, moved) if root.exists() else moved.mkdir()
    return judge(opener, moved, session, seed=tally.seed, shape=_FILLING.shape)


def limit_files(tally: Tally, opener: str, *, limits: Sequence[int], tell: Step) -> None:
    """Commits under RLIMIT_FSIZE, for each limit, and judges what is there.

    Args:
        tally: Takes the findings.
        opener: What opens the store.
        limits: Largest file a writer may make, in bytes.
        tell: Progress.
    """
    tally.points = tally.points_tried = len(limits)
    with scenes.workspace() as workspace:
        template = workspace / "template"
        scenes.prepare(scenes.COMMIT, template, opener, tally.seed)
        for index, limit in enumerate(limits):
            root = scenes.fresh(template, workspace / "store")
            command = children.writer(
                root, opener, seed=tally.seed, rounds=4, shape="mixed", fsize=limit
            )
            finding = _limited(command, root, opener, tally)
            tally.add(finding, where=f"files of at most {limit} B")
            tell(index + 1, len(limits), f"files of at most {limit} B")


def _limited(command: Sequence[str], root: Path, opener: str, tally: Tally) -> Finding:
    try:
        session = session_of(children.run(command)[1])
    except TimeoutError as error:
        return hung(error)
    tally.details["commits refused"] += len(session.errors)
    return judge(opener, root, session, seed=tally.seed, shape="mixed")


def _readable(opener: str, root: Path, session: Session, tally: Tally) -> bool:
    """Whether a reader on the full disk gets what was acknowledged."""
    with suppress(Exception), open_store(opener, root, create=False, read_only=True) as store:
        shown = workload.seen(store)
        return any(
            shown == workload.view(tally.seed, round_, _FILLING.shape)
            for round_ in session.allowed()
        )
    return False


@contextmanager
def _memory_disk(point: Path, kibibytes: int) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(point)],
            capture_output=True,
            text=True,
            check=True,
        )
    except FileNotFoundError as error:
        raise NotMeasured("mount is not installed") from error
    except subprocess.CalledProcessError as error:
        raise NotMeasured(f"a memory disk cannot be mounted: {error.stderr.strip()}") from error
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False)
