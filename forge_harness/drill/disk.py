"""A disk that forgets: what may be left of a directory tree after a power cut.

Calls of a trace are applied twice over: to what processes see, at once, and to what is on disk,
only when a file or directory is synced. After a cut, each change that was not synced may be there
or not: names one by one (a rename is one change), writes in sectors of 512 bytes. That is POSIX's
promise and no more; file systems keep more (ext4 orders its names), so what survives here survives
there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from forge_harness.drill.strace import Call
from forge_harness.drill.tally import NotMeasured

SECTOR = 512

Survives = Literal["nothing", "everything", "some"]
"""Which of the changes that were not synced are still there after the cut."""


@dataclass(slots=True)
class _Change:
    """A write, or a change of length where `data` is None."""

    offset: int
    data: bytes | None


@dataclass(slots=True, eq=False)
class _Move:
    """Names that change together: one, or the two of a rename."""

    parts: list[tuple[Node, str, Node | None]]

    def apply(self) -> None:
        """Takes effect, in what processes see."""
        for directory, name, node in self.parts:
            _rename_in(directory.names, name, node)
            directory.pending_names.append(self)

    def settle(self) -> None:
        """Is on disk: in every directory it is part of."""
        for directory, name, node in self.parts:
            _rename_in(directory.durable_names, name, node)
            directory.pending_names = [move for move in directory.pending_names if move is not self]


@dataclass(slots=True, eq=False)
class Node:
    """A file or a directory."""

    directory: bool
    durable: bytearray = field(default_factory=bytearray)
    pending: list[_Change] = field(default_factory=list)
    names: dict[str, Node] = field(default_factory=dict)
    """What processes see in a directory."""
    durable_names: dict[str, Node] = field(default_factory=dict)
    pending_names: list[_Move] = field(default_factory=list)

    def sync(self) -> None:
        """Makes everything about this node durable; names elsewhere that lead to it are not."""
        for change in self.pending:
            _apply(self.durable, change)
        self.pending.clear()
        for move in list(self.pending_names):
            move.settle()

    def forget(self) -> None:
        """A sync failed: what was not on disk never will be, and the next sync says it is.

        Linux marks the pages clean after a failed write-back ("fsyncgate").
        """
        self.pending.clear()
        self.pending_names.clear()

    def length(self) -> int:
        """Returns the length processes see."""
        size = len(self.durable)
        for change in self.pending:
            if change.data is None:
                size = change.offset
            else:
                size = max(size, change.offset + len(change.data))
        return size


class Disk:
    """The tree below one root.

    Args:
        content: What is there before the first call, all of it on disk.
        root: What the calls call it.
    """

    def __init__(self, content: Path, root: Path) -> None:
        self._prefix = os.path.realpath(root)
        self._top = _load(content)
        self._offsets: dict[int, int] = {}
        self._appending: set[int] = set()

    def apply(self, call: Call) -> None:
        """Applies a call of a trace; one that failed changed nothing, and a failed sync forgets.

        Raises:
            NotMeasured: The call is of a kind this disk does not know.
        """
        handler = _HANDLERS.get(call.name)
        path = call.target()
        if call.name == "lseek":
            self._seek(call)
        elif call.name == "openat":
            self._open(call)
        elif not self._inside(path):
            return
        elif handler is None:
            raise NotMeasured(f"the traced program uses {call.name}, which is not modelled")
        elif not call.failed or call.name in ("fsync", "fdatasync"):
            handler(self, call, path)

    def write(self, target: Path, survives: Survives, generator: random.Random) -> None:
        """Writes what a cut leaves into the empty directory `target`."""
        _store(self._top, target, survives, generator, {})

    def _inside(self, path: str) -> bool:
        return path == self._prefix or path.startswith(self._prefix + "/")

    def _node(self, path: str) -> Node | None:
        node: Node | None = self._top
        for part in path[len(self._prefix) :].split("/"):
            if part and node is not None:
                node = node.names.get(part)
        return node

    def _parent(self, path: str) -> tuple[Node, str]:
        directory, name = os.path.split(path)
        node = self._node(directory)
        if node is None:
            raise NotMeasured(f"the trace uses {directory}, which it never made")
        return node, name

    def _seek(self, call: Call) -> None:
        if not call.failed:
            self._offsets[call.descriptor()[0]] = call.returned

    def _open(self, call: Call) -> None:
        path, flags = call.path(1), call.arguments[2]
        if call.failed or not self._inside(path):
            return
        descriptor = int(str(call.returned))
        self._offsets[descriptor] = 0
        (self._appending.add if "O_APPEND" in flags else self._appending.discard)(descriptor)
        node = self._node(path)
        if node is None and "O_CREAT" in flags:
            parent, name = self._parent(path)
            _Move([(parent, name, Node(directory=False))]).apply()
        elif node is not None and "O_TRUNC" in flags:
            node.pending.append(_Change(0, None))

    def _write(self, call: Call, path: str) -> None:
        node, descriptor = self._node(path), call.descriptor()[0]
        if node is None:  # Its last name is gone: nothing can lead to it after a cut.
            return
        data = call.data(1)[: call.returned]
        if call.name == "pwrite64":
            offset = int(call.arguments[3])
        else:
            start = node.length() if descriptor in self._appending else None
            offset = self._offsets.get(descriptor, 0) if start is None else start
            self._offsets[descriptor] = offset + len(data)
        node.pending.append(_Change(offset, data))

    def _sync(self, call: Call, path: str) -> None:
        node = self._node(path)
        if node is not None:
            (node.forget if call.failed else node.sync)()

    def _resize(self, call: Call, path: str) -> None:
        node = self._node(path)
        if node is not None:
            node.pending.append(_Change(int(call.arguments[1]), None))

    def _rename(self, call: Call, path: str) -> None:
        source = call.path(0 if call.name == "rename" else 1)
        parent, name = self._parent(source)
        node = parent.names[name]
        new_parent, new_name = self._parent(path)
        _Move([(new_parent, new_name, node), (parent, name, None)]).apply()

    def _link(self, call: Call, path: str) -> None:
        node = self._node(call.path(0 if call.name == "link" else 1))
        parent, name = self._parent(path)
        _Move([(parent, name, node)]).apply()

    def _unlink(self, call: Call, path: str) -> None:
        parent, name = self._parent(path)
        _Move([(parent, name, None)]).apply()

    def _mkdir(self, call: Call, path: str) -> None:
        parent, name = self._parent(path)
        _Move([(parent, name, Node(directory=True))]).apply()


_Handler = Callable[[Disk, Call, str], None]
_HANDLERS: dict[str, _Handler] = {
    "write": Disk._write,
    "pwrite64": Disk._write,
    "fsync": Disk._sync,
    "fdatasync": Disk._sync,
    "ftruncate": Disk._resize,
    **dict.fromkeys(("rename", "renameat", "renameat2"), Disk._rename),
    **dict.fromkeys(("link", "linkat"), Disk._link),
    **dict.fromkeys(("unlink", "unlinkat", "rmdir"), Disk._unlink),
    **dict.fromkeys(("mkdir", "mkdirat"), Disk._mkdir),
}


def _apply(content: bytearray, change: _Change) -> None:
    if change.data is None:
        del content[change.offset :]
        content.extend(bytes(change.offset - len(content)))
        return
    content.extend(bytes(max(0, change.offset - len(content))))
    content[change.offset : change.offset + len(change.data)] = change.data


def _load(path: Path) -> Node:
    if not path.is_dir():
        return Node(directory=False, durable=bytearray(path.read_bytes()))
    names = {child.name: _load(child) for child in path.iterdir()}
    return Node(directory=True, names=names, durable_names=dict(names))


def _rename_in(names: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _store(
    node: Node,
    target: Path,
    survives: Survives,
    generator: random.Random,
    moves: dict[_Move, bool],
) -> None:
    if not node.directory:
        content = bytearray(node.durable)
        for change in node.pending:
            for part in _survivors(change, survives, generator):
                _apply(content, part)
        target.write_bytes(content)
        return
    target.mkdir(exist_ok=True)
    names = dict(node.durable_names)
    for move in node.pending_names:
        if move not in moves:
            moves[move] = survives == "everything" or (
                survives == "some" and generator.random() < 0.5
            )
        for directory, name, child in move.parts:
            if moves[move] and directory is node:
                _rename_in(names, name, child)
    for name, child in names.items():
        _store(child, target / name, survives, generator, moves)


def _survivors(change: _Change, survives: Survives, generator: random.Random) -> list[_Change]:
    """Returns the parts of a change that reached the disk: none, all, or some sectors of it."""
    if survives == "everything":
        return [change]
    if survives == "nothing" or generator.random() < 0.4:
        return []
    if change.data is None or generator.random() < 0.5:
        return [change]
    return [
        _Change(change.offset + at, change.data[at : at + SECTOR])
        for at in range(0, len(change.data), SECTOR)
        if generator.random() < 0.5
    ]
