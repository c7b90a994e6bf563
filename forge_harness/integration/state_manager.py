"""`StateManager` keeps the states of the phases: saved durably, verified, migrated, restored."""

from __future__ import annotations

import getpass
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from forge_harness.durable import staged_directory
from forge_harness.errors import ConflictError, StateError, UnknownStateError, unknown_choice
from forge_harness.paths import resolved_path
from forge_harness.security.audit_events import AuditEvent, Decision
from forge_harness.state import CollectReport, Generation, NewState, State, Store, VerifyReport
from forge_harness.state.records import file_names_problem

from .state_kinds import (
    KINDS,
    StateKind,
    check_migration,
    check_value,
    checked_name,
    known_kind,
    phase_name,
    shown,
)
from .state_values import decode, encode

if TYPE_CHECKING:
    from forge_harness.security.audit import AuditLog
    from forge_harness.state import Sealer

ENCODING, MIGRATED_FROM = "encoding", "migrated_from"
MARKS = "checkpoints"
"""Phase under which named checkpoints of the whole store are kept; not one of the pipeline's."""
_MARK = "mark"
_ATTEMPTS = 100
"""Each fails only when another commit came between a look and ours, a few milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSummary:
    """What a store holds now.

    Attributes:
        states: How many, over all phases.
        phases: Phase -> states.
        kinds: Kind -> states.
        migrated: States that came from another phase.
        checkpoints: Labels of the named checkpoints.
        generations: Commits kept.
        bytes: Content of all states, before deduplication and sealing.
    """

    states: int
    phases: Mapping[str, int]
    kinds: Mapping[str, int]
    migrated: int
    checkpoints: tuple[str, ...]
    generations: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateInput:
    """One state of a `save_all`: the arguments of `save`."""

    phase: str | int
    kind: str
    name: str
    data: Any
    metadata: Mapping[str, Any] | None = None
    parents: tuple[str, ...] = ()


class StateManager:
    """Cross-phase states in one store. Use it as a context manager, or call `close`.

    Args:
        root: Directory of the store; made when it is not there.
        kinds: Kinds of your own, beside `state_kinds.KINDS`.
        sealer: Encrypts what is written; the same keys must be given on every opening.
        create: Whether a missing store is made.
        read_only: Never change anything, damaged contents included; for a place nobody can write.
        open_store: Opens a store at a path; None: `Store.open` with the arguments above.
        audit: Log in which every change, and every copy that leaves the store, is recorded before
            it is done, and once more if it ends with an error. The caller closes it.
        actor: Who is recorded.

    Raises:
        AuditError: Of every method that changes or copies out: it cannot be recorded, so nothing
            was done.
        StateError: The directory holds something else, a newer schema, or is on a network file
            system; or the store is locked.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        kinds: Iterable[StateKind] = (),
        sealer: Sealer | None = None,
        create: bool = True,
        read_only: bool = False,
        open_store: Callable[[Path], Store] | None = None,
        audit: AuditLog | None = None,
        actor: str = "",
    ) -> None:
        self.root = Path(root)
        self._audit, self._actor = audit, actor or _user()
        self.kinds = {**KINDS, **{kind.name: kind for kind in kinds}}
        if open_store is None:
            self._store = Store.open(self.root, create=create, read_only=read_only, sealer=sealer)
        else:
            self._store = open_store(self.root)

    def __enter__(self) -> StateManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives up the store's files; nothing acknowledged depends on it."""
        self._store.close()

    def save(
        self,
        *,
        phase: str | int,
        kind: str,
        name: str,
        data: object,
        metadata: Mapping[str, Any] | None = None,
        parents: tuple[str, ...] = (),
    ) -> State:
        """Saves one state, a new version of it when the name is taken; returns once it is durable.

        Args:
            phase: 4, 5, 6 in any spelling, or a name of your own.
            kind: Registered kind.
            name: Of the state within its phase.
            data: See `state_values.encode`: bytes, text, a path, or a tree of JSON values, tensors
                and arrays.
            metadata: JSON values to keep beside it.
            parents: Ids of the states it was made from, which the store holds.

        Raises:
            StateError: A phase, name, kind, value, parent or piece of metadata is refused; nothing
                was written.
            OSError: The file system refused; nothing was acknowledged.
        """
        given = StateInput(
            phase=phase, kind=kind, name=name, data=data, metadata=metadata, parents=parents
        )
        (state,) = self.save_all([given])
        return state

    def save_all(self, inputs: Iterable[StateInput], *, note: str = "") -> tuple[State, ...]:
        """Saves several states as one generation: all of them, or none.

        Raises:
            StateError: As for `save`.
        """
        states = [self._new(given) for given in inputs]
        with self._recorded("state.save", *(f"{state.phase}/{state.name}" for state in states)):
            at = self._store.commit(states, note=note).number
        # At its own generation: another process may have put the same name meanwhile.
        return tuple(self._store.get(s.phase, s.name, generation=at) for s in states)

    def load(self, *, phase: str | int, name: str, generation: int | None = None) -> Any:  # noqa: ANN401
        """Returns what was saved, verified; of a file its bytes, of a directory bytes by path.

        Raises:
            UnknownStateError: There is none of that name; names the nearest.
            DamagedStateError: Its content is not what was saved.
        """
        state = self._with_files(phase, name, generation)
        return decode(
            str(state.metadata.get(ENCODING, "bytes")),
            tuple(state.files),
            lambda file: self._store.read(state, file),
        )

    def get(self, *, phase: str | int, name: str, generation: int | None = None) -> State:
        """Returns what is known of a state without reading its content.

        Raises:
            UnknownStateError: There is none of that name.
        """
        return self._store.get(phase_name(phase), name, generation=generation)

    def copy_out(
        self, target: Path, *, phase: str | int, name: str, generation: int | None = None
    ) -> None:
        """Writes a state's files into a new directory, verified; all of them or none.

        Raises:
            StateError: The state is unknown or damaged, or the target is in use, or inside the
                store.
        """
        self._check_outside(target)
        state = self._with_files(phase, name, generation)
        if (problem := file_names_problem(state.files)) is not None:
            raise StateError(f"{problem} The store was not written by this harness; do not use it.")
        try:
            with (
                self._recorded("state.copy_out", f"{state.phase}/{name}"),
                staged_directory(target) as stage,
            ):
                for file in state.files:
                    self._store.copy_to(state, file, stage / file)
        except FileExistsError as error:
            raise StateError(f"{error}; give a new one.") from error

    def _with_files(self, phase: str | int, name: str, generation: int | None) -> State:
        state = self.get(phase=phase, name=name, generation=generation)
        if not state.files:
            raise StateError(
                f"{state.phase}/{state.name} holds no files: it names generation "
                f"{state.metadata.get(_MARK)}; read a state of that generation, or restore it."
            )
        return state

    def _check_outside(self, target: Path) -> None:
        root, place = resolved_path(self.root), resolved_path(target)
        # What is sealed in the store would lie open in it.
        if place == root or root in place.parents:
            raise StateError(
                f"{str(target)!r} lies inside the store {str(self.root)!r}; name a place outside."
            )

    def list(self, *, phase: str | int | None = None, kind: str | None = None) -> tuple[State, ...]:
        """Returns the states, by phase and name; named checkpoints are not among them.

        Raises:
            StateError: The kind is neither registered nor that of any state; names the nearest.
        """
        chosen = None if phase is None else phase_name(phase)
        states = [state for state in self._store.list() if state.phase != MARKS]
        if kind is not None and kind not in {state.kind for state in states}:
            known_kind(kind, self.kinds)
        found = [s for s in states if chosen in (None, s.phase) and kind in (None, s.kind)]
        return tuple(sorted(found, key=lambda state: (state.phase, state.name)))

    def remove(self, *, phase: str | int, name: str) -> Generation:
        """Removes a state in a new generation; earlier generations keep it until collected.

        Raises:
            UnknownStateError: There is none of that name.
        """
        state = self.get(phase=phase, name=name)
        with self._recorded("state.remove", f"{state.phase}/{name}"):
            return self._store.remove(state.phase, name)

    def verify(self, *, deep: bool = True) -> VerifyReport:
        """Returns what is wrong with the store; deep reads and hashes every content."""
        return self._store.verify(deep=deep)

    def checkpoint(self, label: str) -> Generation:
        """Names the current state of everything, so that `restore` finds it and `collect` keeps it.

        Raises:
            StateError: The label is refused, or there is nothing to name.
        """
        checked_name(label, "checkpoint label")
        if label.isdecimal():
            raise StateError(
                f"Checkpoint label {label!r} would be taken for the number of a generation; "
                "expected a name."
            )
        if self._store.current() is None:
            raise StateError(f"The store {str(self.root)!r} is empty; save a state first.")

        def mark(current: Generation | None) -> NewState:
            number = 0 if current is None else current.number
            return NewState(phase=MARKS, kind=_MARK, name=label, files={}, metadata={_MARK: number})

        with self._recorded("state.checkpoint", label):
            # What it names must be the current generation still: nothing else is sure to be kept.
            named, _ = self._commit_on_current(mark, f"checkpoint {label}")
        assert named is not None
        return named

    def checkpoints(self) -> dict[str, int]:
        """Returns the named checkpoints: label -> generation."""
        return {mark.name: int(mark.metadata[_MARK]) for mark in self._store.list(phase=MARKS)}

    def restore(self, target: str | int) -> Generation:
        """Makes the store what it was at a checkpoint, as a new generation: nothing is forgotten.

        Args:
            target: Label of a checkpoint, or the number of a generation.

        Raises:
            StateError: There is no such checkpoint or generation.
        """
        marks = self.checkpoints()
        if isinstance(target, str):
            # A generation has at most 19 digits; int() refuses a number of thousands of them.
            if target not in marks and not (target.isdecimal() and len(target) < 20):
                raise UnknownStateError(unknown_choice("checkpoint", target, marks))
            target = marks.get(target) or int(target)
        if type(target) is not int:
            raise StateError(
                f"What to restore is {shown(target)}; expected the label of a checkpoint, or the "
                "number of a generation."
            )
        with self._recorded("state.restore", str(target)):
            return self._store.restore(target, keep_phases=(MARKS,))

    def migrate(
        self, *, phase: str | int, name: str, to_phase: str | int, new_name: str | None = None
    ) -> State:
        """Takes a state over into a later phase, verified; repeating it does nothing.

        The content is shared, not copied; the new state names the old one as its parent.

        Args:
            phase: Where it is.
            name: Of the state.
            to_phase: Where it goes.
            new_name: Of the state there; None: the same.

        Raises:
            StateError: The schema has no such move, or another state has the name there.
            DamagedStateError: The state's content is damaged; nothing was written.
        """
        source, destination = phase_name(phase), phase_name(to_phase)
        title = name if new_name is None else checked_name(new_name, "name")
        if (there := self._migrated(source, name, destination, title)) is not None:
            return there
        with self._recorded("state.migrate", f"{source}/{name}", f"{destination}/{title}"):
            _, made = self._commit_on_current(
                lambda _: self._moved(source, name, destination, title),
                f"migrate {source}/{name} to {destination}/{title}",
            )
        return self._store.get(destination, title, generation=made.number)

    def _migrated(self, source: str, name: str, destination: str, title: str) -> State | None:
        """Returns what an earlier migration made of the state as it is; raises as `migrate`."""
        state = self._store.get(source, name)
        kind = known_kind(state.kind, self.kinds)
        check_migration(kind, source, destination)
        there = self._find(destination, title)
        if there is not None and there.parents == (state.id,) and there.files == state.files:
            return there
        if there is not None and there.metadata.get(MIGRATED_FROM) != f"{source}/{name}":
            raise StateError(
                f"{destination}/{title} is there and does not come from {source}/{name}; give "
                "another name."
            )
        if state.metadata.get(ENCODING) == "json":
            check_value(kind, self.load(phase=source, name=name), f"{source}/{name}")
        return None

    def _moved(self, source: str, name: str, destination: str, title: str) -> NewState:
        self._migrated(source, name, destination, title)
        state = self._store.get(source, name)
        return NewState(
            phase=destination,
            kind=state.kind,
            name=title,
            files=state.files,
            metadata={**state.metadata, MIGRATED_FROM: f"{source}/{name}"},
            parents=(state.id,),
        )

    def _commit_on_current(
        self, build: Callable[[Generation | None], NewState], note: str
    ) -> tuple[Generation | None, Generation]:
        """Commits what is built from a look at the store, on what was looked at and nothing newer.

        Returns:
            The generation it was built on, and the one it made.

        Raises:
            StateError: Somebody else commits all the time.
        """
        for _ in range(_ATTEMPTS):
            current = self._store.current()
            parent = 0 if current is None else current.number
            with suppress(ConflictError):
                return current, self._store.commit([build(current)], note=note, parent=parent)
        raise StateError(
            f"The store {str(self.root)!r} is written to all the time: {_ATTEMPTS} attempts met "
            "another commit each. Try again when it is less busy."
        )

    def collect(self, *, retain: int | None = None, grace_s: float = 3600.0) -> CollectReport:
        """Frees what no retained generation and no named checkpoint needs.

        Args:
            retain: Newest generations to keep; None: all.
            grace_s: Age in seconds below which nothing is freed; 0 goes by no clock.
        """
        with self._recorded("state.collect", str(self.root)):
            return self._store.collect(
                retain=retain, keep=lambda: self.checkpoints().values(), grace_s=grace_s
            )

    def rewrap(self) -> tuple[int, int]:
        """Puts everything sealed under the keyring's newest key: (changed, sealed)."""
        with self._recorded("state.rewrap", str(self.root)):
            return self._store.rewrap()

    def summary(self) -> StateSummary:
        """Returns what the store holds now, by phase and kind."""
        states = self.list()
        return StateSummary(
            states=len(states),
            phases=dict(sorted(Counter(state.phase for state in states).items())),
            kinds=dict(sorted(Counter(state.kind for state in states).items())),
            migrated=sum(MIGRATED_FROM in state.metadata for state in states),
            checkpoints=tuple(sorted(self.checkpoints())),
            generations=len(self._store.generations()),
            bytes=sum(file.size for state in states for file in state.files.values()),
        )

    def lost(self) -> Sequence[str]:
        """Returns what was acknowledged after all that is shown now, and is gone; see `verify`."""
        return self._store.lost()

    def generations(self) -> Sequence[Generation]:
        """Returns the generations kept, oldest first."""
        return self._store.generations()

    @contextmanager
    def _recorded(self, action: str, *resources: str) -> Iterator[None]:
        if self._audit is None:
            yield
            return
        event = AuditEvent(
            actor=self._actor,
            action=action,
            resource=", ".join(resources),
            decision=Decision.ALLOW,
            detail={"store": str(self.root)},
        )
        # Before it is done: what cannot be recorded must not happen.
        self._audit.record(event)
        try:
            yield
        except BaseException as error:
            failed = {**event.detail, "error": f"{type(error).__name__}: {error}"}
            self._audit.record(replace(event, decision=Decision.ERROR, detail=failed))
            raise

    def _new(self, given: StateInput) -> NewState:
        state = new_state(given, self.kinds)
        self._check_parents(given)
        return replace(state, parents=tuple(given.parents))

    def _check_parents(self, given: StateInput) -> None:
        """Refuses parents that nobody could follow."""
        parents = given.parents
        if not isinstance(parents, tuple | list):
            raise StateError(
                f"The parents of {given.name!r} are {shown(parents)}; expected a tuple of ids of "
                "states."
            )
        for parent in parents:
            if not isinstance(parent, str):
                raise StateError(
                    f"A parent of {given.name!r} is {shown(parent)}; expected the id of a state."
                )
            self._store.state(parent)

    def _find(self, phase: str, name: str) -> State | None:
        try:
            return self._store.get(phase, name)
        except UnknownStateError:
            return None


def new_state(given: StateInput, kinds: Mapping[str, StateKind] = KINDS) -> NewState:
    """Returns a state as a store takes it, without its parents, which only that store knows.

    Raises:
        StateError: A phase, name, kind, value or piece of metadata is refused.
    """
    phase = phase_name(given.phase)
    _check_metadata(given)
    where = f"{phase}/{checked_name(given.name, 'name')}"
    if phase == MARKS:
        raise StateError(f"The phase {MARKS!r} is the store's own; name another.")
    kind = known_kind(given.kind, kinds)
    check_value(kind, given.data, where)
    value = encode(given.data)
    return NewState(
        phase=phase,
        kind=kind.name,
        name=given.name,
        files=value.files,
        metadata={**(given.metadata or {}), ENCODING: value.encoding},
    )


def _check_metadata(given: StateInput) -> None:
    metadata = given.metadata
    if metadata is not None and not isinstance(metadata, Mapping):
        raise StateError(
            f"The metadata of {given.name!r} is {shown(metadata)}; expected a mapping of JSON "
            "values."
        )
    for own in (ENCODING, MIGRATED_FROM):
        if own in (metadata or {}):
            raise StateError(
                f"The metadata of {given.name!r} has {own!r}, which the store writes itself; "
                "name the key otherwise."
            )


def _user() -> str:
    """Returns who runs this process: by number where the account has no name, as in containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
