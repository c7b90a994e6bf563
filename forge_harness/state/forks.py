"""Tells what is open that its process was forked: a child must not use what its parent opened."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Inherited(Protocol):
    """Something a child of fork gets without having opened it."""

    def disown(self) -> None:
        """Gives it up without closing it; called in the child."""
        ...


def tell_of_forks(opened: Inherited) -> None:
    """Has `disown` of it called in every child that is forked while it lives."""
    _opened.add(opened)


_opened: weakref.WeakSet[Inherited] = weakref.WeakSet()


def _disown_all() -> None:
    for opened in list(_opened):
        opened.disown()


if hasattr(os, "register_at_fork"):  # Windows has none.
    os.register_at_fork(after_in_child=_disown_all)
