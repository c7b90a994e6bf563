"""Campaign `collection`: garbage collection in the middle of commits and reads, at random moments.

Two handles on one store, in one process: while the first makes a file operation, the second
collects. Which operation, what is retained and how young garbage may be come from the seed, so a
schedule that loses something can be run again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from forge_harness.drill import scenes, workload
from forge_harness.drill.tally import Finding, Result, Tally
from forge_harness.drill.target import open_store
from forge_harness.drill.workload import KIND, PHASE, View
from forge_harness.errors import ForgeError, StoreLockedError, UnknownStateError

if TYPE_CHECKING:
    from forge_harness.state import Store

_GRACE_S = 3600.0
_STORE_EVERY = 40
"""Schedules one store lives through; a long history makes the check of every view slow."""
_POOL = 6
"""Distinct contents: few, so that collected ones come back."""
_SIZES = (900, 40_000)
_NAMES = ("a", "b", "c")
_FILE_CALLS = 24
"""Upper end of the operations a commit or read is interrupted at; most make fewer."""

Step = Callable[[int, int, str], None]


def collect_between(tally: Tally, opener: str, *, schedules: int, tell: Step) -> None:
    """Runs random schedules and, after each, reads every generation that had to be kept.

    Args:
        tally: Takes the findings.
        opener: What opens the store; it must take the option `fs`.
        schedules: How many.
        tell: Progress.
    """
    generator = random.Random(tally.seed)
    with scenes.workspace() as workspace:
        for first in range(0, schedules, _STORE_EVERY):
            scene = _Scene(opener, workspace / f"store {first}", generator, tally)
            try:
                for index in range(first, min(first + _STORE_EVERY, schedules)):
                    tally.add(scene.schedule(), where=f"schedule {index}: {scene.did}")
                    tell(index + 1, schedules, scene.did)
            finally:
                scene.close()


class _Scene:
    """A store, what must be in it, and a second handle that collects."""

    def __init__(self, opener: str, root: Path, generator: random.Random, tally: Tally) -> None:
        from forge_harness.state import RealFs

        scene = self

        class Interrupted(RealFs):
            """A file system that lets somebody else go first, once."""

            def __getattribute__(self, name: str) -> object:
                if not name.startswith("_"):
                    scene.interrupt()
                return super().__getattribute__(name)

        self._generator = generator
        self._tally = tally
        self._countdown = -1
        self._collect: Callable[[], object] | None = None
        self._must: dict[int, View] = {}
        self._newest: View = {}
        self.did = ""
        self._store = open_store(opener, root, fs=Interrupted(), lock_timeout_s=0.0)
        self._other = open_store(opener, root, lock_timeout_s=0.0)

    def close(self) -> None:
        """Closes both handles."""
        self._store.close()
        self._other.close()

    def interrupt(self) -> None:
        """Counts a file operation; at the one that was drawn, the other handle collects."""
        self._countdown -= 1
        if self._countdown == 0 and self._collect is not None:
            collect, self._collect = self._collect, None
            collect()

    def schedule(self) -> Finding:
        """Makes one operation with a collection somewhere in it, and looks."""
        draw = self._generator
        young = draw.random() < 0.5
        self._plan(grace_s=0.0 if young else _GRACE_S)
        kind = draw.choice(("commit", "commit", "commit", "read", "restore"))
        self.did = f"{kind}, {'0 s' if young else 'an hour'} of grace"
        try:
            finding = getattr(self, f"_{kind}")(may_fail=young)
            if self._collect is not None:  # It made fewer file operations than were drawn.
                self._collect()
        finally:
            self._countdown, self._collect = -1, None
        return finding if finding is not None else self._look()

    def _plan(self, *, grace_s: float) -> None:
        draw = self._generator
        retain = draw.choice((None, 1, 2, 3))
        keep = draw.sample(sorted(self._must), min(len(self._must), draw.randrange(3)))

        def collect() -> None:
            try:
                self._other.collect(retain=retain, keep=keep, grace_s=grace_s)
            except StoreLockedError:
                self._tally.details["collections held off"] += 1
                return
            self._tally.details["collections made"] += 1
            # The commit that is interrupted may be in already: the store counts, not this model.
            numbers = [generation.number for generation in self._other.generations()]
            kept = {*(numbers[-retain:] if retain else numbers), *keep}
            self._must = {n: view for n, view in self._must.items() if n in kept}

        self._collect = collect
        self._countdown = draw.randrange(1, _FILE_CALLS)

    def _commit(self, *, may_fail: bool) -> Finding | None:
        from forge_harness.state import NewState

        draw = self._generator
        names = draw.sample(_NAMES, draw.randrange(1, len(_NAMES) + 1))
        made = {
            name: workload.content(0, draw.randrange(_POOL), "", draw.choice(_SIZES))
            for name in names
        }
        states = [
            NewState(phase=PHASE, kind=KIND, name=name, files={"data": data})
            for name, data in made.items()
        ]
        try:
            generation = self._store.commit(states)
        except (ForgeError, OSError) as error:
            if may_fail:
                return self._look() if self._bad() else Finding(result=Result.REFUSED)
            return Finding(
                result=Result.LOST, message=f"a commit failed for a collection beside it: {error}"
            )
        new = {f"{PHASE}/{name}/data": workload.digest(data) for name, data in made.items()}
        self._newest = self._must[generation.number] = {**self._newest, **new}
        return None

    def _read(self, *, may_fail: bool) -> Finding | None:
        if not self._must:
            return None
        number = self._generator.choice(sorted(self._must))
        wanted = self._must[number]
        try:
            if _view(self._store, number) == wanted:
                return None
        except UnknownStateError as error:
            # Collected at the very moment, because nobody kept it.
            if number not in self._must:
                return Finding(result=Result.REFUSED)
            return Finding(result=Result.LOST, message=f"generation {number} is gone: {error}")
        except ForgeError as error:
            return Finding(
                result=Result.LOST,
                message=f"generation {number} looks damaged for a collection beside it: {error}",
            )
        return Finding(result=Result.SILENT, message=f"generation {number} reads back wrong")

    def _restore(self, *, may_fail: bool) -> Finding | None:
        if not self._must:
            return None
        number = self._generator.choice(sorted(self._must))
        wanted = self._must[number]
        try:
            generation = self._store.restore(number)
        except ForgeError as error:
            # Collected at the very moment, under this caller's feet, because nobody kept it.
            if number not in self._must:
                return Finding(result=Result.REFUSED)
            return Finding(result=Result.LOST, message=f"generation {number} is gone: {error}")
        self._newest = self._must[generation.number] = wanted
        return None

    def _bad(self) -> str:
        for number, wanted in self._must.items():
            try:
                if _view(self._other, number) != wanted:
                    return f"generation {number} reads back wrong"
            except ForgeError as error:
                return f"generation {number}: {error}"
        return ""

    def _look(self) -> Finding:
        bad = self._bad()
        if bad:
            return Finding(result=Result.LOST, message=bad, acknowledged=1)
        return Finding(result=Result.OLD, acknowledged=1)


def _view(store: Store, number: int) -> View:
    return workload.seen(store, generation=number)
