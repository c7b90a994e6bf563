"""What is being done to a store when a fault strikes it, and the store it is done to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forge_harness.drill import children, workload
from forge_harness.drill.target import open_store

_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One thing a writer does."""

    name: str
    base: int
    """Round that is committed before; -1 when the store does not exist yet."""
    rounds: int = 2
    shape: str = "mixed"
    collect: bool = False
    left: Left | None = None
    """What somebody who was killed, or copied files into the store, left there of what is committed
    next."""

    def command(self, root: Path, opener: str, seed: int) -> list[str]:
        """Returns the writer's command line."""
        return children.writer(
            root,
            opener,
            seed=seed,
            first=self.base + 1,
            rounds=self.rounds,
            shape=self.shape,
            collect=self.collect,
            **({"left": _left_beside(root)} if self.left == "unsynced" else {}),
        )


Left = Literal["unsynced", "damaged"]
"""Contents that are whole and not on disk yet, or on disk and not what their names say."""

COMMIT = Scene(name="commit", base=0)
CREATE = Scene(name="create", base=-1, rounds=1)
COLLECT = Scene(name="collect", base=1, rounds=1, collect=True)
ADOPT = Scene(name="adopt", base=0, rounds=1, left="unsynced")
REPLACE = Scene(name="replace", base=0, rounds=1, left="damaged")
LARGE = Scene(name="commit of 5 MiB", base=0, rounds=1, shape="large")


def prepare(scene: Scene, root: Path, opener: str, seed: int) -> None:
    """Makes the store a scene starts from, closed and quiet."""
    if scene.base < 0:
        root.mkdir()
        return
    with open_store(opener, root) as store:
        for round_ in range(scene.base + 1):
            store.commit(workload.states(seed, round_, scene.shape), note=f"round {round_}")
    if scene.left is not None:
        _leave(scene, root, opener, seed)


def _leave(scene: Scene, root: Path, opener: str, seed: int) -> None:
    """Makes what is left of the next round: beside the store, or damaged and in it.

    A store whose files are not the contents themselves gets nothing, and commits as ever.
    """
    states = workload.states(seed, scene.base + 1, scene.shape)
    known = {workload.digest(data) for state in states for data in state.files.values()}  # type: ignore[arg-type]
    with workspace() as scratch:
        ahead = fresh(root, scratch / "ahead")
        with open_store(opener, ahead) as store:
            store.commit(states)
        for path in sorted(ahead.rglob("*")):
            inside = path.relative_to(ahead)
            if not path.is_file() or (root / inside).exists():
                continue
            if workload.digest(content := path.read_bytes()) not in known:
                continue
            target = (root if scene.left == "damaged" else _left_beside(root)) / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            damaged = content[:-1] + bytes([content[-1] ^ 1])
            target.write_bytes(damaged if scene.left == "damaged" else content)


def _left_beside(root: Path) -> Path:
    """Where the writer finds what it is to leave; one place for the scenes of a campaign."""
    return root.parent / "left"


@contextmanager
def workspace(*, in_memory: bool = True) -> Iterator[Path]:
    """Yields an empty directory, in memory where that can be had: trials make and drop thousands.

    Args:
        in_memory: False where the kind of file system matters.
    """
    memory = _MEMORY if in_memory and _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="forge-drill-", dir=memory) as directory:
        yield Path(directory)


def fresh(template: Path, target: Path) -> Path:
    """Puts a copy of `template` at `target`, whatever was there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(template, target)
    return target
