"""What the campaigns write: states whose every byte follows from a seed and a round.

Each round replaces the same names in one commit, beside one state that is never touched again.
So what a store may show after a fault is short to say: the view of one round, whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forge_harness.state import NewState, Store

PHASE = "phase5"
KIND = "drill"
KEPT = "kept"
"""The state only round 0 writes."""

SHAPES: Mapping[str, Mapping[str, Mapping[str, int]]] = {
    "small": {"metrics": {"data": 120}},
    "mixed": {
        "metrics": {"data": 120},
        "optimizer": {"data": 3_000, "empty": 0},
        "weights": {"data": 70_000},
        "teacher": {"data": 40_000},
    },
    "large": {"metrics": {"data": 120}, "weights": {"data": 5 << 20}},
}
"""Name of a workload -> state name -> file -> bytes. `large` exceeds one 4 MiB chunk."""

SAME = ("teacher",)
"""States whose content is the same in every round: committing it again must not harm it."""

View = dict[str, str]
"""`phase/name/file` -> SHA-256 of the content."""


def content(seed: int, round_: int, label: str, size: int) -> bytes:
    """Returns bytes that no other seed, round or label has."""
    return hashlib.shake_256(f"{seed}/{round_}/{label}".encode()).digest(size)


def states(seed: int, round_: int, shape: str, *, prefix: str = "") -> list[NewState]:
    """Returns what one round commits, in one generation."""
    from forge_harness.state import NewState

    return [
        NewState(
            phase=PHASE,
            kind=KIND,
            name=prefix + name,
            files={
                file: _content(seed, round_, prefix, name, file, size)
                for file, size in files.items()
            },
            metadata={"round": round_},
        )
        for name, files in _files(round_, shape)
    ]


def view(seed: int, round_: int, shape: str, *, prefix: str = "") -> View:
    """Returns what a store shows whose last commit was this round; nothing before round 0."""
    if round_ < 0:
        return {}
    shown = {
        f"{PHASE}/{prefix}{name}/{file}": digest(_content(seed, round_, prefix, name, file, size))
        for name, files in _files(round_, shape)
        for file, size in files.items()
    }
    kept = _content(seed, 0, prefix, KEPT, "data", 500)
    return {**shown, f"{PHASE}/{prefix}{KEPT}/data": digest(kept)}


def seen(store: Store, *, prefix: str = "", generation: int | None = None) -> View:
    """Returns what a store shows, by reading every file it lists.

    Hashed here: the store's own digests are what is being judged.
    """
    return {
        f"{state.phase}/{state.name}/{file}": digest(store.read(state, file))
        for state in store.list(generation=generation)
        if state.name.startswith(prefix)
        for file in state.files
    }


def _files(round_: int, shape: str) -> Iterator[tuple[str, Mapping[str, int]]]:
    yield from SHAPES[shape].items()
    if round_ == 0:
        yield KEPT, {"data": 500}


def _content(seed: int, round_: int, prefix: str, name: str, file: str, size: int) -> bytes:
    return content(seed, 0 if name in SAME else round_, f"{prefix}{name}/{file}", size)


def digest(data: bytes) -> str:
    """Returns the SHA-256 of a content."""
    return hashlib.sha256(data).hexdigest()
