"""A file system in memory that can lose power, and be seen in every state that may leave behind.

What a disk guarantees is only what was synced: of the writes since the last fsync of a file any
subset may have reached it, each torn at sectors of 512 bytes; of the names made, moved or removed
since the last fsync of their directory any subset may have. This is the model of ALICE (Pillai et
al., OSDI 2014) without the orders that particular file systems add.

SQLite does not go through this seam; the index is covered by real kills, by replaying traces of
its system calls, and by real power cuts (`forge-harness drill storage`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512

Choose = Callable[[int], int]
"""Returns a number from 0 up to its argument, inclusive; decides what survives."""


class PowerCut(BaseException):
    """The power is gone: no handler of ordinary errors may go on."""


@dataclass(slots=True)
class _Inode:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    """(offset, bytes) written since the last fsync, in order."""


@dataclass(frozen=True, slots=True)
class _NameChange:
    """One change of a directory that is not durable yet; a rename is one change of two names."""

    removed: Path | None
    added: Path | None
    inode: _Inode | None


class SimulatedFs:
    """An `Fs` in memory. Times are a counter: each operation takes a second.

    Args:
        cut_before: The operation before which power is cut, counted from 0; None: never.
    """

    def __init__(self, cut_before: int | None = None) -> None:
        self.operations = 0
        self.cut_before = cut_before
        self._names: dict[Path, _Inode | None] = {}
        """Path -> file, or None for a directory."""
        self._durable: dict[Path, _Inode | None] = {}
        self._changes: list[_NameChange] = []
        self._handles: dict[int, tuple[_Inode, int]] = {}
        self._modified: dict[int, float] = {}

    def create(self, path: Path) -> int:
        """See `Fs`."""
        self._step()
        self._free(path)
        inode = _Inode()
        self._change(_NameChange(None, path, inode))
        return self._handle(inode)

    def write(self, handle: int, data: memoryview) -> int:
        """See `Fs`."""
        self._step()
        inode, offset = self._handles[handle]
        inode.data[offset : offset + len(data)] = data
        inode.pending.append((offset, bytes(data)))
        self._handles[handle] = (inode, offset + len(data))
        self._modified[id(inode)] = float(self.operations)
        return len(data)

    def fsync(self, handle: int) -> None:
        """See `Fs`."""
        self._step()
        inode, _ = self._handles[handle]
        inode.durable, inode.pending = bytes(inode.data), []

    def close(self, handle: int) -> None:
        """See `Fs`."""
        del self._handles[handle]

    def open(self, path: Path) -> int:
        """See `Fs`."""
        return self._handle(self._file(path))

    def read(self, handle: int, size: int) -> bytes:
        """See `Fs`."""
        inode, offset = self._handles[handle]
        self._handles[handle] = (inode, offset + size)
        return bytes(inode.data[offset : offset + size])

    def size(self, path: Path) -> int:
        """See `Fs`."""
        return len(self._file(path).data)

    def modified_at(self, path: Path) -> float:
        """See `Fs`."""
        return self._modified.get(id(self._file(path)), 0.0)

    def exists(self, path: Path) -> bool:
        """See `Fs`."""
        return path in self._names

    def names(self, path: Path) -> list[str]:
        """See `Fs`."""
        return sorted(name.name for name in self._names if name.parent == path)

    def rename(self, source: Path, target: Path) -> None:
        """See `Fs`."""
        self._step()
        inode = self._file(source)
        self._free(target)
        self._change(_NameChange(source, target, inode))

    def unlink(self, path: Path) -> None:
        """See `Fs`."""
        self._step()
        self._file(path)
        self._change(_NameChange(path, None, None))

    def mkdir(self, path: Path) -> None:
        """See `Fs`."""
        self._step()
        self._free(path)
        self._change(_NameChange(None, path, None))

    def fsync_dir(self, path: Path) -> None:
        """See `Fs`."""
        self._step()
        left = []
        for change in self._changes:
            if path in (parent_of(change.added), parent_of(change.removed)):
                _apply(change, self._durable)
            else:
                left.append(change)
        self._changes = left

    def after_power_cut(self, choose: Choose) -> SimulatedFs:
        """Returns what may be found when the power is back.

        Args:
            choose: Decides which of the changes that were not synced survived.
        """
        found = SimulatedFs()
        names = dict(self._durable)
        for change in self._changes:
            if choose(1):
                _apply(change, names)
        # A name whose directory did not survive is not reachable.
        reachable = {p: i for p, i in names.items() if _has_parents(p, names)}
        for path, inode in reachable.items():
            found._names[path] = None if inode is None else _survivor(inode, choose)
        found._durable = dict(found._names)
        return found

    def make_root(self, path: Path) -> None:
        """Makes a directory that is there and durable before anything else happens."""
        for parent in (*reversed(path.parents), path):
            self._names[parent] = self._durable[parent] = None

    def _step(self) -> None:
        if self.operations == self.cut_before:
            raise PowerCut
        self.operations += 1

    def _handle(self, inode: _Inode) -> int:
        handle = max(self._handles, default=2) + 1
        self._handles[handle] = (inode, 0)
        return handle

    def _file(self, path: Path) -> _Inode:
        inode = self._names.get(path)
        if inode is None:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return inode

    def _free(self, path: Path) -> None:
        if path in self._names:
            raise FileExistsError(17, "File exists", str(path))
        if path.parent not in self._names:
            raise FileNotFoundError(2, "No such file or directory", str(path))

    def _change(self, change: _NameChange) -> None:
        _apply(change, self._names)
        self._changes.append(change)


def parent_of(path: Path | None) -> Path | None:
    """Returns the directory of a name that a change may not have."""
    return None if path is None else path.parent


def _apply(change: _NameChange, names: dict[Path, _Inode | None]) -> None:
    if change.removed is not None:
        names.pop(change.removed, None)
    if change.added is not None:
        names[change.added] = change.inode


def _has_parents(path: Path, names: dict[Path, _Inode | None]) -> bool:
    return all(parent in names and names[parent] is None for parent in path.parents)


def _survivor(inode: _Inode, choose: Choose) -> _Inode:
    data = bytearray(inode.durable)
    for offset, written in inode.pending:
        for start in range(0, len(written), SECTOR):
            if choose(1):
                part = written[start : start + SECTOR]
                end = offset + start + len(part)
                data.extend(bytes(max(0, end - len(data))))
                data[offset + start : end] = part
    return _Inode(data, bytes(data))
