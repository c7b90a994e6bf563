"""Campaigns `kill` and `errors`: every write-class system call of a commit, struck once each."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from forge_harness.drill import children, replay, scenes, strace
from forge_harness.drill.children import session_of
from forge_harness.drill.judge import judge
from forge_harness.drill.scenes import Scene
from forge_harness.drill.strace import Call, Fault
from forge_harness.drill.tally import Finding, Result, Tally, hung

_T = TypeVar("_T")
Step = Callable[[int, int, str], None]
"""Told done, total and what was done last."""


def enumerate_points(
    scene: Scene, template: Path, workspace: Path, opener: str, seed: int
) -> list[Call]:
    """Returns every call of the scene that changes something in the store."""
    command = _command(scene, workspace, opener, seed)
    scenes.fresh(template, workspace / "store")
    children.fill_cache(command)
    root = scenes.fresh(template, workspace / "store")
    return strace.points_of(strace.record(command, workspace / "trace"), root)


def _command(scene: Scene, workspace: Path, opener: str, seed: int) -> list[str]:
    command = scene.command(workspace / "store", opener, seed)
    return children.cached_in(command, workspace / "byte code")


def strike_all(
    tally: Tally,
    opener: str,
    *,
    faults: Sequence[Fault],
    scenes_: Sequence[Scene],
    limit: int,
    tell: Step,
) -> None:
    """Strikes the points of each scene with each fault and counts what was found.

    Args:
        tally: Takes the findings.
        opener: What opens the store.
        faults: What is done to a call.
        scenes_: What is being done meanwhile.
        limit: Most trials; all of them when 0. Which are left out is drawn from the seed, and up
            to half of the rest are syncs that fail: few calls of a store sync, and a store that
            believes one that failed shows nowhere else.
        tell: Progress.

    Raises:
        NotMeasured: strace does not run here.
    """
    strace.require()
    with scenes.workspace() as workspace:
        trials = []
        for scene in scenes_:
            template = workspace / f"template {scene.name}"
            scenes.prepare(scene, template, opener, tally.seed)
            points = enumerate_points(scene, template, workspace, opener, tally.seed)
            tally.points += len(points) * len(faults)
            trials += [(scene, template, point, fault) for point in points for fault in faults]
        syncs = [t for t in trials if _is_failed_sync(t[2], t[3])]
        # `sample` takes 0 for all there are.
        first = sample(syncs, limit // 2, tally.seed) if limit > 1 else []
        others = [t for t in trials if t not in first]
        chosen = first + sample(others, limit - len(first) if limit else 0, tally.seed)
        tally.points_tried += len(chosen)
        for index, (scene, template, point, fault) in enumerate(chosen):
            where = f"{scene.name}, {fault.name} at {point.name} #{point.nth}"
            finding = strace.aimed(
                point,
                partial(_strike, scene, template, workspace, opener, fault, tally.seed),
                partial(enumerate_points, scene, template, workspace, opener, tally.seed),
            )
            if finding is None:
                tally.miss(where)
            else:
                tally.add(finding, where=where)
            tell(index + 1, len(chosen), where)


def _strike(
    scene: Scene,
    template: Path,
    workspace: Path,
    opener: str,
    fault: Fault,
    seed: int,
    point: Call,
) -> Finding | None:
    root = scenes.fresh(template, workspace / "store")
    command = _command(scene, workspace, opener, seed)
    try:
        if _is_failed_sync(point, fault):
            return _failed_sync(scene, template, root, command, opener, point, seed)
        output = strace.strike(command, point, fault, root.parent / "trace", root)
    except TimeoutError as error:
        return hung(error)
    if output is None:
        return None
    return judge(opener, root, session_of(output, base=scene.base), seed=seed, shape=scene.shape)


def _is_failed_sync(point: Call, fault: Fault) -> bool:
    return fault == strace.EIO and point.name == "fsync"


def _failed_sync(
    scene: Scene,
    template: Path,
    root: Path,
    command: Sequence[str],
    opener: str,
    point: Call,
    seed: int,
) -> Finding | None:
    """A sync that failed once, and then the power cut that shows what it did not write.

    A store that tries again is told the second sync succeeded, and it wrote nothing.
    """
    trace = root.parent / "trace"
    rule = strace.rule_of(point, strace.EIO)
    calls, output = strace.record_output(command, trace, rules=[rule])
    if not strace.is_struck(calls, point, root):
        return None
    session = session_of(output, base=scene.base)
    found = judge(opener, root, session, seed=seed, shape=scene.shape)
    if found.result not in (Result.OLD, Result.NEW):
        return found
    after = replay.cut(template, root, calls, "nothing", random.Random(seed))
    return judge(opener, after, session, seed=seed, shape=scene.shape)


def sample(trials: Sequence[_T], limit: int, seed: int) -> list[_T]:
    """Returns all trials, or `limit` of them drawn from the seed, in order."""
    if not limit or limit >= len(trials):
        return list(trials)
    chosen = sorted(random.Random(seed).sample(range(len(trials)), limit))
    return [trials[index] for index in chosen]
