"""Campaign `replay`: power cuts at every system call of a commit, on a simulated disk.

The calls are those of a real run, recorded; only the disk is simulated. So this needs no root, hits
every point, and sees what a kill cannot: a file or a name that was never synced.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from forge_harness.drill import scenes, strace
from forge_harness.drill.children import session_of
from forge_harness.drill.disk import Disk, Survives
from forge_harness.drill.judge import judge
from forge_harness.drill.scenes import Scene
from forge_harness.drill.strace import Call
from forge_harness.drill.tally import Tally

Step = Callable[[int, int, str], None]


def cut_everywhere(
    tally: Tally,
    opener: str,
    *,
    scenes_: Sequence[Scene],
    subsets: int,
    limit: int,
    tell: Step,
) -> None:
    """Cuts the power before every call and at the end, and counts what is found.

    At each point nothing that was not synced survives, then everything, then `subsets` random
    parts of it.

    Args:
        tally: Takes the findings.
        opener: What opens the store.
        scenes_: What is being done meanwhile.
        subsets: Random parts tried at each point.
        limit: Most trials; all of them when 0.
        tell: Progress.

    Raises:
        NotMeasured: strace does not run here, or the store uses calls that are not modelled.
    """
    strace.require()
    ways: list[Survives] = ["nothing", "everything", *(["some"] * subsets)]  # type: ignore[list-item]
    with scenes.workspace() as workspace:
        trials: list[tuple[Scene, Path, list[Call], int, Survives, int]] = []
        for scene in scenes_:
            template = workspace / f"template {scene.name}"
            scenes.prepare(scene, template, opener, tally.seed)
            root = scenes.fresh(template, workspace / "store")
            calls = strace.record(scene.command(root, opener, tally.seed), workspace / "trace")
            stops = _stops(calls, root)
            tally.points += len(stops) * len(ways)
            trials += [
                (scene, template, calls, stop, way, number)
                for stop in stops
                for number, way in enumerate(ways)
            ]
        generator = random.Random(tally.seed)
        if limit and limit < len(trials):
            trials = [trials[i] for i in sorted(generator.sample(range(len(trials)), limit))]
        tally.points_tried += len(trials)
        for index, (scene, template, calls, stop, way, number) in enumerate(trials):
            where = f"{scene.name}, cut before call {stop} of {len(calls)}, {way} survives"
            before = calls[:stop]
            root = workspace / "store"
            dice = random.Random(f"{tally.seed} {scene.name} {stop} {number}")
            left = cut(template, root, before, way, dice)
            said = "".join(call.said() for call in before).encode()
            session = session_of(said, base=scene.base)
            finding = judge(opener, left, session, seed=tally.seed, shape=scene.shape)
            tally.add(finding, where=where)
            tell(index + 1, len(trials), where)


def cut(
    template: Path,
    root: Path,
    calls: Sequence[Call],
    survives: Survives,
    generator: random.Random,
) -> Path:
    """Returns a directory with what a power cut after these calls leaves of the store at `root`.

    Args:
        template: The store before the first call, all of it on disk.
        root: Where the store was when it was traced.
        calls: Calls up to the cut.
        survives: What is left of changes that were not synced.
        generator: Draws what survives.
    """
    disk = Disk(template, root)
    for call in calls:
        disk.apply(call)
    left = root.with_name("after the cut")
    shutil.rmtree(left, ignore_errors=True)
    left.mkdir()
    disk.write(left, survives, generator)
    return left


def _stops(calls: Sequence[Call], root: Path) -> list[int]:
    """Positions in the trace before each call on the store, and after the last call of all.

    What was printed counts from the next call on, so a cut just after an acknowledgement is one.
    """
    return [*strace.positions_of(calls, root), len(calls)]
