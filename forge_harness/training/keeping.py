"""Where a run's checkpoints are kept: files in its directory, or states in a store."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from forge_harness.canonical import canonical_json
from forge_harness.errors import DamagedStateError
from forge_harness.state import NewState, State, Store
from forge_harness.training.checkpoint import CheckpointError, save_session
from forge_harness.training.session import QATSession

KEPT = 2
"""The newest one, and the one before it should that be damaged."""
PHASE, KIND, FILE = "phase5", "checkpoint", "checkpoint.safetensors"


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
        """Returns the file of the newest sound checkpoint; raises CheckpointError without one."""
        ...


@dataclass(frozen=True, slots=True)
class DirectoryCheckpoints:
    """Files `step-N.safetensors` in a directory."""

    path: Path

    def file(self, step: int) -> Path:
        """Returns the file of the checkpoint after `step` steps."""
        return self.path / f"step-{step}.safetensors"

    def files(self) -> list[Path]:
        """Returns the checkpoints that are there, oldest first, by step and not by name or time."""
        numbered = [
            (path.stem.removeprefix("step-"), path) for path in self.path.glob("step-*.safetensors")
        ]
        return [path for _, path in sorted((int(n), p) for n, p in numbered if n.isdecimal())]

    def begin(self) -> None:
        """Nothing to refuse: the directory is the run's own."""

    def finish(self, package: Path | None, result: Mapping[str, Any]) -> None:
        """Nothing to keep: package and metrics are in the run's directory."""

    def save(self, session: QATSession) -> None:
        """Saves the session durably, then removes the files over `KEPT`."""
        save_session(session, self.file(session.step_index))
        for old in self.files()[:-KEPT]:
            old.unlink()

    def newest(self) -> Path:
        """Returns the newest file.

        Raises:
            CheckpointError: There is none.
        """
        found = self.files()
        if not found:
            where = f"{str(self.path.parent)!r} has no checkpoint in {self.path.name}/"
            raise CheckpointError(f"{where}.")
        return found[-1]


class StateCheckpoints:
    """States `RUN/step-N` of phase 5 in a store: verified on reading, the one before as spare.

    Args:
        root: Of the store; made when it is not there.
        run: Name of the run in the store.
        scratch: Directory for the file a checkpoint is on its way in and out.
    """

    def __init__(self, root: Path, run: str, scratch: Path) -> None:
        self.root, self.run, self._scratch = root, run, scratch

    def begin(self) -> None:
        """Refuses a name under which the store has checkpoints already.

        Raises:
            CheckpointError: It has; they are another run's.
        """
        with Store.open(self.root) as store:
            found = self._states(store)
        if found:
            raise CheckpointError(
                f"The store {str(self.root)!r} has checkpoints of a run {self.run!r} "
                f"({found[-1].name}); give --out another name, or --resume that run."
            )

    def finish(self, package: Path | None, result: Mapping[str, Any]) -> None:
        """Commits package and metrics as one generation, made from the newest checkpoint."""
        numbers = {k: v for k, v in result.items() if isinstance(v, int | float)}
        words = {k: v for k, v in result.items() if k not in numbers}
        with Store.open(self.root) as store:
            parents = tuple(state.id for state in self._states(store)[-1:])
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
        """Commits the session as a state, then removes the states over `KEPT`."""
        step = session.step_index
        file = self._scratch / f"step-{step}.safetensors"
        try:
            save_session(session, file)
            state = NewState(
                phase=PHASE,
                kind=KIND,
                name=f"{self.run}/step-{step}",
                files={FILE: file},
                metadata={"encoding": "file", "step": step, "task": session.task},
            )
            with Store.open(self.root) as store:
                store.commit([state], note=f"checkpoint of {self.run} after {step} steps")
                for old in self._states(store)[:-KEPT]:
                    store.remove(old.phase, old.name)
        finally:
            self._clear()

    def newest(self) -> Path:
        """Returns a verified copy of the newest checkpoint that is not damaged.

        Raises:
            CheckpointError: There is none, or all are damaged.
        """
        with Store.open(self.root, create=False) as store:
            damaged = []
            for state in reversed(self._states(store)):
                target = self._scratch / f"{state.name.rpartition('/')[2]}.safetensors"
                try:
                    store.copy_to(state, FILE, target)
                except DamagedStateError as error:
                    damaged.append(str(error))
                else:
                    return target
        reason = f": {damaged[0]}" if damaged else ""
        raise CheckpointError(
            f"The store {str(self.root)!r} has no sound checkpoint of run {self.run!r}{reason}"
        )

    def _states(self, store: Store) -> list[State]:
        """The run's checkpoints, oldest first."""
        prefix = f"{self.run}/step-"
        own = [s for s in store.list(phase=PHASE, kind=KIND) if s.name.startswith(prefix)]
        return sorted(own, key=lambda state: int(state.name.removeprefix(prefix)))

    def _clear(self) -> None:
        with suppress(OSError):
            shutil.rmtree(self._scratch)
