"""Kinds of state and what each phase takes over: the schema a state is checked against."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from forge_harness.errors import StateError, unknown_choice

PHASES = ("phase4", "phase5", "phase6")
"""BitNet compression, quantization-aware training, baking; states move forward only."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)*")
_LONGEST_NAME = 200
_LONGEST_SHOWN = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class StateKind:
    """One kind of state.

    Attributes:
        name: As in `save(kind=...)`.
        holds: What it is, for messages and listings.
        required: Keys a mapping of this kind must have; bytes and files are opaque.
        numeric: Whether every value of a mapping must be a finite number.
        enters: Phases it may be migrated into.
    """

    name: str
    holds: str
    required: tuple[str, ...] = ()
    numeric: bool = False
    enters: tuple[str, ...] = PHASES


KINDS: Mapping[str, StateKind] = {
    kind.name: kind
    for kind in (
        StateKind(name="artifact", holds="anything else, opaque"),
        StateKind(name="checkpoint", holds="a training checkpoint", enters=("phase5",)),
        StateKind(name="config", holds="configuration"),
        StateKind(name="data", holds="data, or its description"),
        StateKind(name="lineage", holds="where something comes from"),
        StateKind(name="log", holds="a log"),
        StateKind(name="metrics", holds="named numbers", numeric=True),
        StateKind(name="model", holds="a model: weights and description"),
        StateKind(name="optimizer", holds="optimizer state", enters=("phase5",)),
        StateKind(name="package", holds="an export package"),
        StateKind(name="report", holds="a report"),
        StateKind(name="rng", holds="state of random generators", enters=("phase5",)),
        StateKind(name="run", holds="the record of a validation run", required=("schema_version",)),
        StateKind(name="tokenizer", holds="a tokenizer or label map"),
        StateKind(name="weights", holds="weights alone"),
    )
}
"""The kinds every store knows; `StateManager(kinds=...)` adds to them."""


def phase_name(phase: str | int) -> str:
    """Returns the one spelling of a phase: 5, "5", "Phase 5" and "phase-5" are "phase5".

    Raises:
        StateError: It cannot be a name.
    """
    if isinstance(phase, bool) or not isinstance(phase, str | int) or not _is_short(phase):
        raise StateError(
            f"The phase of a state is {shown(phase)}; expected 4, 5, 6 in any spelling, or a name."
        )
    text = str(phase).strip().lower()
    numbered = re.fullmatch(r"(?:phase[ _-]?)?([0-9]+)", text)
    return f"phase{int(numbered[1])}" if numbered else checked_name(text, "phase")


def _is_short(phase: str | int) -> bool:
    """Whether a phase can be a name: str() and int() raise on thousands of digits."""
    return len(phase) <= _LONGEST_NAME if isinstance(phase, str) else abs(phase) < 10**9


def shown(value: object) -> str:
    """Returns a value as a message names it: of one line, cut, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def checked_name(name: str, what: str) -> str:
    """Returns a name that may be part of a path and of a command line.

    Raises:
        StateError: It is empty, too long, or has other characters.
    """
    if (
        isinstance(name, str)
        and len(name) <= _LONGEST_NAME
        and _NAME.fullmatch(name)
        and ".." not in name.split("/")
    ):
        return name
    raise StateError(
        f"{shown(name)} is no {what} of a state; expected up to {_LONGEST_NAME} letters, digits "
        "and '.', '_', '+', '-', in parts joined by '/', each starting with a letter or digit."
    )


def known_kind(kind: str, kinds: Mapping[str, StateKind]) -> StateKind:
    """Returns a kind by name.

    Raises:
        StateError: It is not registered; names the nearest.
    """
    if isinstance(kind, str) and kind in kinds:
        return kinds[kind]
    named = kind if isinstance(kind, str) else shown(kind)
    raise StateError(
        f"{unknown_choice('kind of state', named, kinds)} Register a kind of your own with "
        "StateManager(root, kinds=[StateKind(...)])."
    )


def check_value(kind: StateKind, data: object, where: str) -> None:
    """Refuses a mapping that is not what its kind promises.

    Raises:
        StateError: A key is missing, or a number is none.
    """
    if not isinstance(data, Mapping):
        return
    missing = [key for key in kind.required if key not in data]
    if missing:
        raise StateError(
            f"{where} is of kind {kind.name!r} and lacks {', '.join(map(repr, missing))}; expected "
            f"{', '.join(map(repr, kind.required))}."
        )
    if not kind.numeric:
        return
    for key, value in data.items():
        if not _is_finite(value):
            raise StateError(
                f"{where} is of kind {kind.name!r} and holds {shown(value)} under {shown(key)}; "
                "expected a finite number."
            )


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # An integer of hundreds of digits, which no float holds.
        return False


def check_migration(kind: StateKind, source: str, target: str) -> None:
    """Refuses a move between phases that the schema does not have.

    Raises:
        StateError: Backwards, to the same phase, or a kind the target does not take.
    """
    if source == target:
        raise StateError(f"The state is in {source!r} already; name another phase.")
    order = {phase: position for position, phase in enumerate(PHASES)}
    if order.get(target, math.inf) < order.get(source, -math.inf):
        raise StateError(
            f"States move forward only, and {target!r} comes before {source!r}; use restore to go "
            "back to an earlier generation."
        )
    if target in order and target not in kind.enters:
        raise StateError(
            f"{target!r} does not take states of kind {kind.name!r} ({kind.holds}); it takes "
            f"{', '.join(_takes(target))}."
        )


def _takes(phase: str) -> Iterable[str]:
    return (kind.name for kind in KINDS.values() if phase in kind.enters)
