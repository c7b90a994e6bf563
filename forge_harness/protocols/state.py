"""The state store, and checkpoints that come from outside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpec:
    """How other processes open a state store, and which old ones it must still read."""

    opener: str
    """`module:attribute`, importable in a fresh process: called as `opener(root, **options)` with
    the options of `forge_harness.state.Store.open`, it returns a store with the same methods."""
    old_stores: Path | None = None
    """Directory of stores as earlier releases wrote them; None when there was no earlier one."""
    plaintext: frozenset[str] = frozenset()
    """Files of a sealed store that are not sealed, besides those of `forge_harness.state`, by their
    paths below the root: a version, a lock. No content may be in them."""


@runtime_checkable
class KeepsState(Protocol):
    """Keeps the states of all phases in a store that other processes can open too."""

    def state_store(self) -> StoreSpec:
        """Returns how the store is opened; crash campaigns kill processes that use it."""
        ...


@runtime_checkable
class ReadsCheckpoints(Protocol):
    """Reads checkpoints that come from outside."""

    def read_checkpoint(self, path: Path) -> None:
        """Opens a file or directory and reads every tensor; raises ForgeError to refuse it.

        Formats that it does not know are refused too.
        """
        ...
