"""Where a run's checkpoints are kept: in its directory, or as states in a store.

Of several ranks all call `save` together; the rest is for rank 0 alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from forge_harness.canonical import canonical_json
from forge_harness.durable import remove_partials
from forge_harness.errors import ConflictError, DamagedStateError, StateError
from forge_harness.state import NewState, Sealer, State, Store
from forge_harness.state.trial import try_commit
from forge_harness.training.checkpoint import CheckpointError, read_header, save_session
from forge_harness.training.session import QATSession

KEPT = 2
"""The newest one, and the one before it should that be damaged."""
PHASE, KIND, FILE = "phase5", "checkpoint", "checkpoint.safetensors"
_MOST_STEPS = 10_000_000
"""What the configuration takes."""
_ATTEMPTS = 100
"""Each fails only when another commit came between looking and committing, a few milliseconds."""

OnDamaged = Callable[[str], object]
"""Told in a sentence of a checkpoint that cannot be read."""


class KeepsCheckpoints(Protocol):
    """Keeps the newest checkpoints of one run."""

    def begin(self) -> None:
        """Refuses a place that holds another run's checkpoints; raises CheckpointError."""
        ...

    def save(self, session: QATSession) -> None:
        """Saves the session durably, then lets go of the ones over `KEPT`."""
        ...

    def finish(self, package: Path | None, result: Mapping[str, Any]) -> None:
        """Keeps what the run came to: the package of a ternary model, and its metrics."""
        ...

    def newest(self) -> Path:
        """Returns the file of the newest checkpoint; raises CheckpointError without one."""
        ...

    def resumable(self, on_damaged: OnDamaged) -> Path:
        """Returns the file of the newest sound checkpoint; raises CheckpointError without one.

        Only for who alone writes where the checkpoints are.
        """
        ...


@dataclass(frozen=True, slots=True)
class DirectoryCheckpoints:
    """Files `step-N.safetensors` in a directory, or directories `step-N` of sharded sessions."""

    path: Path

    def file(self, step: int) -> Path:
        """Returns the file of the checkpoint after `step` steps."""
        return self.path / f"step-{step}.safetensors"

    def files(self) -> list[Path]:
        """Returns the checkpoints that are there, oldest first, by step and not by name or time."""
        found = [p for p in self.path.glob("step-*") if p.suffix == ".safetensors" or p.is_dir()]
        numbered = [(path.stem.removeprefix("step-"), path) for path in found]
        return [path for _, path in sorted((int(n), p) for n, p in numbered if n.isdecimal())]

    def begin(self) -> None:
        """Nothing to refuse: the directory is the run's own."""

    def finish(self, package: Path | None, result: Mapping[str, Any]) -> None:
        """Nothing to keep: package and metrics are in the run's directory."""

    def save(self, session: QATSession) -> None:
        """Saves the session durably, then removes the ones over `KEPT`."""
        file, ranks = self.file(session.step_index), session.ranks
        if ranks.shards:
            save_session(session, file.with_suffix(""))
        else:
            ranks.first(lambda: save_session(session, file))
        ranks.first(self._let_go)

    def _let_go(self) -> None:
        for old in self.files()[:-KEPT]:
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()

    def newest(self) -> Path:
        """Returns the newest file.

        Raises:
            CheckpointError: There is none.
        """
        return self._newest_first()[0]

    def resumable(self, on_damaged: OnDamaged) -> Path:
        """Returns the newest file that is whole, and removes what killed writes have left.

        Args:
            on_damaged: Told of newer ones that are not.

        Raises:
            CheckpointError: There is none, or all are damaged; the newest one's.
        """
        remove_partials(self.path)
        damaged = []
        for file in self._newest_first():
            try:
                read_header(file)
            except CheckpointError as error:
                damaged.append(error)
            else:
                for refused in damaged:
                    on_damaged(f"{refused} The run goes on from {file.name}.")
                return file
        raise damaged[0]

    def _newest_first(self) -> list[Path]:
        found = self.files()
        if not found:
            raise CheckpointError(
                f"{str(self.path.parent)!r} has no checkpoint in {self.path.name}/: a run ends "
                "without one when it is stopped before its first; start it again in a new "
                "directory."
            )
        return found[::-1]


class StateCheckpoints:
    """States `RUN/step-N` of phase 5 in a store: verified on reading, the one before as spare.

    Args:
        root: Of the store; made when it is not there.
        run: Name of the run in the store.
        scratch: Directory for the file a checkpoint is on its way in and out.
        owner: Tells the run from others of its name; "" for runs of earlier builds.
        sealer: Encrypts what is kept; a sealed store takes nothing without.
    """

    def __init__(
        self, root: Path, run: str, scratch: Path, owner: str = "", sealer: Sealer | None = None
    ) -> None:
        self.root, self.run, self.owner, self._scratch = root, run, owner, scratch
        self._sealer = sealer

    def begin(self) -> None:
        """Refuses a name no state can have, or under which the store has checkpoints already.

        Raises:
            CheckpointError: It is such a name, or they are another run's.
            StateError: The store takes no commit from here: it is sealed, or locked.
            WrongKeyError: It is sealed under other keys.
        """
        try:
            state = NewState(
                phase=PHASE, kind=KIND, name=f"{self.run}/step-{_MOST_STEPS}", files={}
            )
        except StateError as error:
            raise CheckpointError(
                f"A store cannot keep a run under the name {self.run!r}: expected UTF-8 without "
                "control characters, 240 characters at most; give --out another name."
            ) from error
        with self._open() as store:
            found = self._states(store)
            # What is refused here would have been after the whole training.
            try_commit(store, state)
        if found:
            raise CheckpointError(
                f"The store {str(self.root)!r} has checkpoints of a run {self.run!r} "
                f"({found[-1].name}); give --out another name, or --resume that run."
            )

    def finish(self, package: Path | None, result: Mapping[str, Any]) -> None:
        """Commits package and metrics as one generation, made from the newest checkpoint."""
        numbers = {k: v for k, v in result.items() if isinstance(v, int | float)}
        words = {k: v for k, v in result.items() if k not in numbers}
        with self._open() as store:
            parents = tuple(state.id for state in self._own(store)[-1:])
            states = [
                NewState(
                    phase=PHASE,
                    kind="metrics",
                    name=f"{self.run}/metrics",
                    files={"data": canonical_json(numbers)},
                    metadata={**words, "encoding": "json"},
                    parents=parents,
                )
            ]
            if package is not None:
                files = {
                    path.relative_to(package).as_posix(): path
                    for path in sorted(package.rglob("*"))
                    if path.is_file()
                }
                states.append(
                    NewState(
                        phase=PHASE,
                        kind="package",
                        name=f"{self.run}/package",
                        files=files,
                        metadata={"encoding": "directory"},
                        parents=parents,
                    )
                )
            store.commit(states, note=f"result of {self.run}")

    def save(self, session: QATSession) -> None:
        """Commits the session as a state, then removes the states over `KEPT`.

        Raises:
            CheckpointError: Another run of this name began at the same time and was first; nothing
                of it is touched.
        """
        session.ranks.first(lambda: self._save(session))

    def _save(self, session: QATSession) -> None:
        step = session.step_index
        file = self._scratch / f"step-{step}.safetensors"
        try:
            save_session(session, file)
            state = NewState(
                phase=PHASE,
                kind=KIND,
                name=f"{self.run}/step-{step}",
                files={FILE: file},
                metadata={
                    "encoding": "file",
                    "step": step,
                    "task": session.task,
                    "run": self.owner,
                },
            )
            with self._open() as store:
                self._commit(store, state, f"checkpoint of {self.run} after {step} steps")
                for old in self._states(store)[:-KEPT]:
                    store.remove(old.phase, old.name)
        finally:
            self._clear()

    def newest(self) -> Path:
        """Returns a verified copy of the newest checkpoint that is not damaged.

        Raises:
            CheckpointError: There is none, or all are damaged; or they are another run's.
        """
        return self.resumable(lambda _: None)

    def resumable(self, on_damaged: OnDamaged) -> Path:
        """As `newest`.

        Args:
            on_damaged: Told of newer ones that are damaged.
        """
        with self._open(create=False) as store:
            damaged = [f"{sentence}." for sentence in store.lost()]
            for state in reversed(self._own(store)):
                target = self._scratch / f"{state.name.rpartition('/')[2]}.safetensors"
                try:
                    store.copy_to(state, FILE, target)
                except DamagedStateError as error:
                    damaged.append(str(error))
                else:
                    for sentence in damaged:
                        on_damaged(f"{sentence} The run goes on from {state.name}.")
                    return target
        kept = f"The store {str(self.root)!r} has no"
        if damaged:
            raise CheckpointError(f"{kept} sound checkpoint of run {self.run!r}: {damaged[0]}")
        raise CheckpointError(
            f"{kept} checkpoint of run {self.run!r}: a run ends without one when it is stopped "
            "before its first; start it again in a new directory."
        )

    def _open(self, *, create: bool = True) -> Store:
        return Store.open(self.root, create=create, sealer=self._sealer)

    def _commit(self, store: Store, state: NewState, note: str) -> None:
        """Commits unless a run of this name was first; commits of other names do not matter."""
        for _ in range(_ATTEMPTS):
            current = store.current()
            self._own(store)
            parent = 0 if current is None else current.number
            with suppress(ConflictError):
                store.commit([state], note=note, parent=parent)
                return
        raise CheckpointError(
            f"The store {str(self.root)!r} is written to all the time: {_ATTEMPTS} attempts to "
            "keep a checkpoint met another commit each. Resume when it is less busy."
        )

    def _states(self, store: Store) -> list[State]:
        """The checkpoints of runs of this name, oldest first."""
        prefix = f"{self.run}/step-"
        named = [s for s in store.list(phase=PHASE, kind=KIND) if s.name.startswith(prefix)]
        numbered = [(s.name.removeprefix(prefix), s) for s in named]
        found = [(int(step), state) for step, state in numbered if step.isdecimal()]
        return [state for _, state in sorted(found, key=lambda pair: pair[0])]

    def _own(self, store: Store) -> list[State]:
        """As `_states`, unless another run of this name has them; then raises CheckpointError."""
        found = self._states(store)
        for state in found:
            if state.metadata.get("run", "") != self.owner:
                raise CheckpointError(
                    f"The store {str(self.root)!r} has checkpoints of another run {self.run!r} "
                    f"({state.name}), which began at the same time; start this one again with "
                    "another name of --out."
                )
        return found

    def _clear(self) -> None:
        with suppress(OSError):
            shutil.rmtree(self._scratch)
