"""What goes into the store and what comes out of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge_harness.errors import StateError

Json = Any
"""A JSON value: None, bool, int, float, str, list or dict of them."""

_LABEL = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,255}")


@dataclass(frozen=True, slots=True)
class BlobRef:
    """Content by its digest."""

    digest: str
    """Lower-case hexadecimal SHA-256 of the plaintext."""
    size: int
    """Bytes of the plaintext."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewState:
    """A state to commit.

    Raises:
        StateError: A label is empty, longer than 255 characters or has control characters; a file
            name leads out of the state, or is a directory of another.
    """

    phase: str
    kind: str
    name: str
    files: Mapping[str, bytes | Path | BlobRef]
    """File name within the state -> content, a file to copy, or content the store holds."""
    metadata: Mapping[str, Json] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    """Ids of the states it was made from."""

    def __post_init__(self) -> None:
        for what, label in (("phase", self.phase), ("kind", self.kind), ("name", self.name)):
            _check_label(what, label)
        for name in self.files:
            _check_label("file name", name)
        problem = file_names_problem(self.files)
        if problem is not None:
            raise StateError(f"{problem} Choose another.")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A committed state. Another content under the same phase and name is another state."""

    id: str
    """Hexadecimal; from everything else here and the history before it."""
    phase: str
    kind: str
    name: str
    generation: int
    """Number of the generation that brought it."""
    files: Mapping[str, BlobRef]
    metadata: Mapping[str, Json]
    parents: tuple[str, ...]
    created_at: str
    """UTC, ISO 8601 with microseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One commit: what it changed, bound to all that came before by its parent's digest."""

    number: int
    manifest_digest: str
    parent_digest: str | None
    note: str
    created_at: str
    changed: tuple[str, ...]
    """Ids of the states it put, or put back."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing found wrong."""

    where: str
    """Generation, state and file, or path."""
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a verification looked at and what it found."""

    deep: bool
    """Whether every content was to be read and hashed, not only looked for."""
    generations: int
    states: int
    """Distinct states over all generations."""
    contents: int
    """Distinct contents that should be there."""
    content_bytes: int
    """Bytes of them, sealed or not, as they lie on disk."""
    collected: int
    """Contents that only generations no longer retained had; gone on purpose."""
    unread: int
    """Contents that are there and were not read: only a deep verification does."""
    unopened: int
    """Sealed contents that lie as they were written, and may be lost all the same: without a key,
    neither the head that the key opens nor what comes out could be looked at."""
    orphans: int
    """Files no generation has: left by a kill, swept by `Store.collect`."""
    quarantined: int
    """Damaged contents kept aside."""
    foreign: tuple[str, ...]
    """Paths below objects/ that no store wrote; nothing reads or removes them."""
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, and nothing that was to be opened stayed sealed."""
        return not self.problems and not self.unopened


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectReport:
    """What a collection removed and what it kept."""

    retained: int
    """Generations whose every content was kept."""
    contents_removed: int
    files_removed: int
    """Files of contents, orphans and temporary files."""
    bytes_freed: int
    kept_by_grace: int
    """Contents and files nothing needs that are younger than the grace period."""
    quarantined: int
    """Damaged contents kept aside; a collection never removes them."""


def file_names_problem(names: Collection[str]) -> str | None:
    """Returns what is wrong with the file names of a state, or None.

    They become paths where a state is written out, and a store may come from anybody.
    """
    for name in names:
        parts = name.split("/")
        if "\\" in name or any(part in ("", ".", "..") for part in parts):
            return (
                f"The file name {name!r} of a state is no relative path; expected names joined by "
                "'/', none of them empty, '.' or '..'."
            )
        for end in range(1, len(parts)):
            if (parent := "/".join(parts[:end])) in names:
                return f"The file name {parent!r} of a state is also the directory of {name!r}."
    return None


def _check_label(what: str, label: object) -> None:
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise StateError(
            f"The {what} of a state is {label!r}; expected 1 to 255 characters without control "
            "characters. Choose another."
        )
