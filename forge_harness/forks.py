"""Tells what is open that its process was forked: a child must not use what its parent opened."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from typing import Protocol


class Inherited(Protocol):
    """Something a child of fork gets without having opened it."""

    def disown(self) -> None:
        """Gives it up without closing it for the parent; called in the child."""
        ...


def tell_of_forks(opened: Inherited) -> None:
    """Has `disown` of it called in every child that is forked while it lives."""
    _opened.add(opened)


def never_free(inherited: object) -> None:
    """Keeps an object for as long as the process lives, where freeing it would close its file.

    For a connection to SQLite: closed in a child, it could remove the log that its parent and
    others write to.
    """
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


class Lockable:
    """An open file to lock (flock), which no child of fork keeps open, and so locked.

    The lock belongs to the open file and not to the process: a child, a data loader's worker for
    one, would hold it for as long as it lives, its parent killed or not.

    Args:
        descriptor: Of the file; closed with this.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._is_open = True
        tell_of_forks(self)

    def close(self) -> None:
        """Lets go of the lock and closes the file; does nothing in a child that inherited it."""
        import fcntl  # Windows has none.

        if not self._is_open:
            return
        self._is_open = False
        # Closing is not enough: what is being forked at this moment still has the file open.
        with suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)

    def disown(self) -> None:
        """Closes the child's copy; the lock stays with the parent."""
        if self._is_open:
            self._is_open = False
            with suppress(OSError):
                os.close(self.descriptor)


_opened: weakref.WeakSet[Inherited] = weakref.WeakSet()


def _disown_all() -> None:
    for opened in list(_opened):
        opened.disown()


if hasattr(os, "register_at_fork"):  # Windows has none.
    os.register_at_fork(after_in_child=_disown_all)
