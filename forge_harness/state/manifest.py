"""The manifest of a generation: canonical JSON of what it changed and of its parent's digest.

The text is the truth and is hashed as it is stored; nothing is serialized again to verify it. Its
length depends on what the commit changed, not on how much the store holds.

    {"changes": [...], "created_at": ..., "format": 3, "generation": n, "note": ...,
     "parent": digest of the parent's manifest or null}

A change puts a state, removes a name, or uses a state that an earlier generation put. Formats 1
(without metadata) and 2 (without parents) are read as they were written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from forge_harness.canonical import canonical_json, sha256_hex
from forge_harness.errors import StateError

from .records import BlobRef, Generation, NewState, State, file_names_problem

FORMAT = 3
"""The one that is written."""

Key = tuple[str, str]
"""Phase and name."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest as read back."""

    generation: Generation
    changes: tuple[tuple[Key, str | None], ...]
    """(phase, name) -> id of the state that has the name from here on, None for none."""
    states: tuple[State, ...]
    """The states it put."""


def now() -> str:
    """Returns the time as a manifest has it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def build(
    number: int,
    parent: str | None,
    note: str,
    created_at: str,
    changes: Iterable[Mapping[str, Any]],
) -> bytes:
    """Returns the text of a manifest.

    Raises:
        StateError: The note or a state's metadata is not JSON that every reader agrees on.
    """
    document = {
        "changes": list(changes),
        "created_at": created_at,
        "format": FORMAT,
        "generation": number,
        "note": note,
        "parent": parent,
    }
    try:
        return canonical_json(document)
    except (ValueError, TypeError) as error:
        raise StateError(
            f"The metadata or note of the commit cannot be kept: {error}. Use JSON values with "
            "finite numbers."
        ) from error


def put(state: NewState, files: Mapping[str, BlobRef], seed: str) -> dict[str, Any]:
    """Returns the change that puts a state.

    Args:
        state: What to put.
        files: Its contents.
        seed: Differs in every commit, so that two states never share an id.

    Raises:
        StateError: The metadata is not JSON that every reader agrees on.
    """
    body = {
        "phase": state.phase,
        "kind": state.kind,
        "name": state.name,
        "files": {name: {"digest": ref.digest, "size": ref.size} for name, ref in files.items()},
        "metadata": dict(state.metadata),
        "parents": list(state.parents),
    }
    try:
        text = canonical_json([seed, body])
    except (ValueError, TypeError) as error:
        raise StateError(
            f"The metadata of state {state.name!r} cannot be kept: {error}. Use JSON values with "
            "finite numbers."
        ) from error
    return {"action": "put", "state": {"id": sha256_hex(text)[:32], **body}}


def remove(key: Key) -> dict[str, Any]:
    """Returns the change that takes a name away."""
    return {"action": "remove", "phase": key[0], "name": key[1]}


def use(key: Key, state_id: str) -> dict[str, Any]:
    """Returns the change that gives a name back to a state put earlier."""
    return {"action": "use", "phase": key[0], "name": key[1], "state": state_id}


_MALFORMED = (
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    UnicodeDecodeError,
    json.JSONDecodeError,
)


def parse(text: bytes, digest: str) -> Manifest:
    """Returns what a manifest says.

    Raises:
        ValueError: The text does not hash to `digest`, or is no manifest this release reads.
    """
    if sha256_hex(text) != digest:
        raise ValueError("its manifest does not hash to its digest")
    try:
        document = json.loads(text)
        if document["format"] not in range(1, FORMAT + 1):
            raise ValueError(f"its manifest has format {document['format']!r}")
        return _parse(document, digest)
    except _MALFORMED as error:
        raise ValueError(f"its manifest is malformed: {error!r}") from error


def _parse(document: Mapping[str, Any], digest: str) -> Manifest:
    number, created_at = document["generation"], document["created_at"]
    states: list[State] = []
    changes: list[tuple[Key, str | None]] = []
    for change in document["changes"]:
        if change["action"] == "put":
            state = _state(change["state"], number, created_at)
            states.append(state)
            changes.append(((state.phase, state.name), state.id))
        else:
            key = (change["phase"], change["name"])
            changes.append((key, change["state"] if change["action"] == "use" else None))
    generation = Generation(
        number=number,
        manifest_digest=digest,
        parent_digest=document["parent"],
        note=document["note"],
        created_at=created_at,
        changed=tuple(state for _, state in changes if state is not None),
    )
    return Manifest(generation, tuple(changes), tuple(states))


def _state(body: Mapping[str, Any], number: int, created_at: str) -> State:
    if (problem := file_names_problem(body["files"])) is not None:
        raise ValueError(f"its manifest is malformed: {problem}")
    return State(
        id=body["id"],
        phase=body["phase"],
        kind=body["kind"],
        name=body["name"],
        generation=number,
        files={name: BlobRef(ref["digest"], ref["size"]) for name, ref in body["files"].items()},
        metadata=body.get("metadata", {}),
        parents=tuple(body.get("parents", ())),
        created_at=created_at,
    )


def difference(now: Mapping[Key, str], wanted: Mapping[Key, str]) -> Sequence[dict[str, Any]]:
    """Returns the changes that make the view `now` equal to `wanted`."""
    used = [use(key, wanted[key]) for key in sorted(wanted) if now.get(key) != wanted[key]]
    return [*used, *(remove(key) for key in sorted(now) if key not in wanted)]
