"""Whether a store would take a commit, before the work for it is done."""

from __future__ import annotations

from contextlib import suppress

from forge_harness.errors import ConflictError

from .records import NewState
from .store import Store

_NO_GENERATION = -1
"""A parent no store has."""


def try_commit(store: Store, state: NewState) -> None:
    """Raises what would keep a commit of a state out; commits nothing.

    Args:
        store: An open store.
        state: As it would be committed; its files are not read.

    Raises:
        StateError: The store takes no commit from here: it is sealed, or locked.
        WrongKeyError: It is sealed under other keys.
    """
    # Refused as a conflict once all else is checked.
    with suppress(ConflictError):
        store.commit([state], parent=_NO_GENERATION)
