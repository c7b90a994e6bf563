"""The chain of generations, verified as it is read, and what is in the store at each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge_harness.errors import UnknownStateError, nearest

from .head import HEAD, Head
from .manifest import Key, Manifest, parse
from .records import Generation, Problem, State


@dataclass(frozen=True, slots=True)
class Row:
    """A generation as the index holds it."""

    number: int
    copies: tuple[tuple[str, bytes], ...]
    """(digest, manifest), each as stored; one that verifies is enough."""
    complete: bool
    """Whether both copies could be read."""


class History:
    """Generations in memory. One counts when its manifest and all its ancestors' verify."""

    def __init__(self) -> None:
        self.states: dict[str, State] = {}
        self.problems: list[Problem] = []
        self.last_number = 0
        """Newest number in the index, verified or not."""
        self.damaged = 0
        """Generations that do not count."""
        self._gone: list[Problem] = []
        """Generations after the current one that do not count, or are not there any more."""
        self._manifests: dict[int, Manifest] = {}
        self._numbers: dict[str, int] = {}
        self._current: int | None = None
        self._view: dict[Key, str] = {}

    def extend(self, rows: Iterable[Row]) -> None:
        """Takes in what the index holds beyond `last_number`, in order."""
        for row in rows:
            for missing in range(self.last_number + 1, row.number):
                self._damage(missing, "both copies of its manifest are missing")
            self.last_number = row.number
            self._take(row)

    def _take(self, row: Row) -> None:
        manifest, reasons = _verified(row)
        if manifest is None:
            self._damage(row.number, reasons[0])
            return
        if reasons:
            self.problems.append(
                Problem(f"generation {row.number}", f"one of its two copies is bad: {reasons[0]}")
            )
        parent = manifest.generation.parent_digest
        if parent is not None and parent not in self._numbers:
            self._damage(row.number, "an earlier generation it builds on does not verify")
            return
        self._manifests[row.number] = manifest
        self._numbers[manifest.generation.manifest_digest] = row.number
        self.states.update((state.id, state) for state in manifest.states)
        if parent is not None and self._numbers[parent] != self._current:
            self._view = self.view(self._numbers[parent])
        elif parent is None:
            self._view = {}
        self._current = row.number
        self._gone.clear()
        _apply(self._view, manifest)

    def _damage(self, number: int, why: str) -> None:
        self.damaged += 1
        self._gone.append(Problem(f"generation {number}", why))
        self.problems.append(self._gone[-1])

    @property
    def current(self) -> Generation | None:
        """The newest generation that counts."""
        return None if self._current is None else self._manifests[self._current].generation

    def lacks(self, head: Head) -> Head | None:
        """Returns the note when the generation it names is not in the index, else None."""
        if head.number == 0 or head.digest in self._numbers:
            return None
        # A damaged one is there and was reported as such.
        if head.number <= self.last_number and head.number not in self._manifests:
            return None
        return head

    def report(self, head: Head, losses: Iterable[str]) -> None:
        """Adds to the problems what the note beside the index tells."""
        if not head.is_legible:
            self.problems.append(Problem(HEAD, "the note of the newest generation is damaged"))
        if self.lacks(head):
            losses = [*losses, f"{head.number} {head.digest}"]
        for loss in losses:
            number, _, digest = loss.partition(" ")
            what = (
                "it was acknowledged and is not in the index; the index or its write-ahead log was "
                f"damaged or replaced (manifest {digest})"
            )
            self.problems.append(Problem(f"generation {number}", what))
        if self.lacks(head):
            self._gone.append(self.problems[-1])

    def lost(self) -> list[Problem]:
        """Returns what is gone and came after the current generation, which stands in for it."""
        return list(self._gone)

    @property
    def fell_back(self) -> bool:
        """Whether a newer generation than the current one is in the index and does not verify."""
        return self.last_number != (self._current or 0)

    def generations(self) -> list[Generation]:
        """Returns those that count, oldest first."""
        return [self._manifests[number].generation for number in sorted(self._manifests)]

    def view(self, number: int | None = None) -> dict[Key, str]:
        """Returns (phase, name) -> state id at a generation, by default the current one.

        Raises:
            UnknownStateError: There is no such generation, or it does not verify.
        """
        if number is None or number == self._current:
            return dict(self._view)
        view: dict[Key, str] = {}
        for manifest in self._ancestry(number):
            _apply(view, manifest)
        return view

    def _ancestry(self, number: int) -> Sequence[Manifest]:
        if number not in self._manifests:
            raise UnknownStateError(
                f"Generation {number} is not in the store or does not verify; expected one of the "
                f"{len(self._manifests)} that do, the newest being {self._current}."
            )
        found = []
        at: int | None = number
        while at is not None:
            found.append(self._manifests[at])
            parent = found[-1].generation.parent_digest
            at = None if parent is None else self._numbers[parent]
        return found[::-1]


def _apply(view: dict[Key, str], manifest: Manifest) -> None:
    for key, state in manifest.changes:
        if state is None:
            view.pop(key, None)
        else:
            view[key] = state


def _verified(row: Row) -> tuple[Manifest | None, list[str]]:
    """The first copy that verifies, and what is wrong with the others."""
    reasons = [] if row.complete else ["it is missing or cannot be read"]
    good: tuple[str, bytes] | None = None
    found: Manifest | None = None
    for copy in row.copies:
        if copy == good:
            continue
        try:
            manifest = parse(copy[1], copy[0])
            if manifest.generation.number != row.number:
                raise ValueError(f"its manifest is that of {manifest.generation.number}")
            if good is not None:
                raise ValueError("both copies verify and they differ")
            good, found = copy, manifest
        except ValueError as error:
            reasons.append(str(error))
    return found, reasons


def states_of(view: Mapping[Key, str], states: Mapping[str, State]) -> list[State]:
    """Returns the states of a view by phase and name."""
    return [states[view[key]] for key in sorted(view)]


def unknown_state(root: Path, view: Mapping[Key, str], phase: str, name: str) -> UnknownStateError:
    """Returns the error for a state that a view of the store does not have."""
    close = nearest(f"{phase}/{name}", (f"{p}/{n}" for p, n in view))
    hint = f" Did you mean {close!r}?" if close else " List the states to see what is there."
    return UnknownStateError(f"There is no state {phase}/{name} in {root}.{hint}")
