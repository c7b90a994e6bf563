"""Enumerating and failing system calls with strace.

A first, clean run lists every call that changes something under the store's root. Each of them is a
*point*: named by the call, by how many calls of that name came before it, which is what strace
counts, and by how many of those were on the store. A second run is struck by the first number and
held to the other: what an interpreter opens before it reaches the store differs from run to run,
with the byte code that others cached meanwhile and with the directories they wrote to.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

from forge_harness.drill import children
from forge_harness.drill.tally import NotMeasured

OPENS = ("openat", "creat")
FD_CALLS = ("write", "writev", "pwrite64", "pwritev", "pwritev2", "fsync", "fdatasync")
RESIZE_CALLS = ("ftruncate", "fallocate", "sync_file_range")
COPY_CALLS = ("copy_file_range", "sendfile")
PATH_CALLS = ("rename", "link", "unlink", "mkdir", "rmdir", "truncate", "symlink")
AT_CALLS = ("renameat", "renameat2", "linkat", "unlinkat", "mkdirat", "symlinkat")
WRITE_CLASS = (*OPENS, *FD_CALLS, *RESIZE_CALLS, *COPY_CALLS, *PATH_CALLS, *AT_CALLS)
"""System calls that change files or names, or make changes durable."""

_LINE = re.compile(r"(\d+)\s+(\w+)\((.*)\)\s+=\s+(-?\d+|\?)(.*)")
_TEXT = re.compile(r"(?:\\x[0-9a-f]{2})*")
_T = TypeVar("_T")
_TRIES = 5
_DATA_LIMIT = 1 << 23
"""Bytes of one write that are kept; more than any campaign writes at once."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What strace does to a call."""

    name: str
    rule: str
    onwards: bool = False
    """Whether every later call of that name is struck as well: a disk that stays full."""


KILL = Fault("SIGKILL", "signal=SIGKILL")
EIO = Fault("EIO", "error=EIO")
ENOSPC = Fault("ENOSPC", "error=ENOSPC")
EINTR = Fault("EINTR", "error=EINTR")
FULL = Fault("ENOSPC from there on", "error=ENOSPC", onwards=True)


@dataclass(frozen=True, slots=True)
class Call:
    """One system call of a trace."""

    name: str
    nth: int
    """1 for the first call of that name in the process."""
    arguments: tuple[str, ...]
    returned: int
    failed: bool
    struck: bool = False
    """Whether strace made it fail, or killed the process in it."""
    order: int = 0
    """Of a point: 1 for the first of that name that changes something in the store."""

    def text(self, index: int) -> str:
        """Returns a string argument, decoded."""
        return unescape(self.arguments[index].strip('"')).decode("utf-8", "surrogateescape")

    def data(self, index: int) -> bytes:
        """Returns a buffer argument."""
        return unescape(self.arguments[index].strip('"'))

    def descriptor(self, index: int = 0) -> tuple[int, str]:
        """Returns number and path of a descriptor argument; -100 for the working directory."""
        number, _, path = self.arguments[index].partition("<")
        found = unescape(path.removesuffix(">")).decode("utf-8", "surrogateescape")
        return (-100 if number == "AT_FDCWD" else int(number)), found

    def path(self, index: int) -> str:
        """Returns a path argument as an absolute path.

        `index` is that of the string; a call whose name ends in "at" has the directory before it.
        """
        given = self.text(index)
        if given.startswith("/"):
            return os.path.normpath(given)
        directory = self.descriptor(index - 1)[1] if index else os.getcwd()
        return os.path.normpath(os.path.join(directory, given))

    def target(self) -> str:
        """Returns the path the call changes; "" when it changes none."""
        if self.name in (*FD_CALLS, *RESIZE_CALLS):
            return self.descriptor()[1]
        if self.name == "sendfile":
            return self.descriptor(0)[1]
        if self.name == "copy_file_range":
            return self.descriptor(2)[1]
        if self.name in ("openat", "creat"):
            return self._opened()
        if self.name in ("rename", "link", "symlink"):
            return self.path(1)
        if self.name in ("renameat", "renameat2", "linkat"):
            return self.path(3)
        if self.name == "symlinkat":
            return self.path(2)
        return self.path(1 if self.name in AT_CALLS else 0)

    def _opened(self) -> str:
        if self.name == "creat":
            return self.path(0)
        flags = self.arguments[2]
        return self.path(1) if "O_CREAT" in flags or "O_TRUNC" in flags else ""

    def said(self) -> str:
        """Returns what the call printed on standard output, if that is what it did."""
        if self.name != "write" or self.descriptor()[0] != 1 or self.failed:
            return ""
        return self.data(1).decode("utf-8", "replace")


@cache
def _problem() -> str:
    if shutil.which("strace") is None:
        return "strace is not installed (`apt-get install strace`)"
    status, _, err = children.run([*_strace("/dev/null"), "-e", "trace=none", "true"])
    if status != 0:
        why = err.decode("utf-8", "replace").strip().splitlines()
        return f"strace cannot trace here: {why[-1] if why else f'exit status {status}'}"
    return ""


def require() -> None:
    """Raises NotMeasured, with the reason, where strace does not run."""
    if _problem():
        raise NotMeasured(_problem())


def record(command: Sequence[str], trace: Path, *, rules: Sequence[str] = ()) -> list[Call]:
    """Runs a command and returns its write-class calls in order, with the data they wrote.

    Args:
        command: What to run.
        trace: File for strace's output.
        rules: Injections, as `rule_of` makes them.
    """
    return record_output(command, trace, rules=rules)[0]


def record_output(
    command: Sequence[str], trace: Path, *, rules: Sequence[str] = ()
) -> tuple[list[Call], bytes]:
    """As `record`; returns the command's output too."""
    options = ["-y", "-xx", "-s", str(_DATA_LIMIT), "-e", f"trace={','.join(WRITE_CLASS)},lseek"]
    injected = [part for rule in rules for part in ("-e", f"inject={rule}")]
    _, out, _ = children.run([*_strace(trace), *options, *injected, *command])
    return parse(trace.read_text(encoding="ascii")), out


def aimed(
    point: Call, strike_at: Callable[[Call], _T | None], points: Callable[[], Sequence[Call]]
) -> _T | None:
    """Strikes a point; where another call was struck, counts the program's calls again and retries.

    Args:
        point: One of `points_of`.
        strike_at: Runs the program with a fault at a point; None when the point was not struck.
        points: Runs it without, and returns its points.

    Returns:
        What `strike_at` did; None when the point was struck in none of five runs.
    """
    for _ in range(_TRIES - 1):
        if (found := strike_at(point)) is not None:
            return found
        same = [p for p in points() if (p.name, p.order) == (point.name, point.order)]
        if not same:
            return None
        (point,) = same
    return strike_at(point)


def strike(
    command: Sequence[str], point: Call, fault: Fault, trace: Path, root: Path
) -> bytes | None:
    """Runs a command with a fault at one point.

    Returns:
        What it printed; None when another call was struck, or none.

    Raises:
        TimeoutError: It hangs.
    """
    tracing = ["-e", f"trace={point.name}", "-e", f"inject={rule_of(point, fault)}"]
    output = children.run([*_strace(trace), "-y", "-xx", "-s", "0", *tracing, *command])[1]
    calls = parse(trace.read_text(encoding="ascii"))
    return output if is_struck(calls, point, root) else None


def is_struck(calls: Sequence[Call], point: Call, root: Path) -> bool:
    """Returns whether the first call that was struck is the point."""
    first = next((index for index, call in enumerate(calls) if call.struck), None)
    if first is None:
        return False
    of_that_name = [call for call in calls[: first + 1] if call.name == point.name]
    points = points_of(of_that_name, root)
    return bool(points) and points[-1].struck and points[-1].order == point.order


def rule_of(call: Call, fault: Fault) -> str:
    """Returns the injection that strikes one call."""
    return f"{call.name}:{fault.rule}:when={call.nth}{'+' if fault.onwards else ''}"


def points_of(calls: Sequence[Call], root: Path) -> list[Call]:
    """Returns the calls that change something at or below `root`, each with its order."""
    counts: Counter[str] = Counter()
    points = []
    for index in positions_of(calls, root):
        counts[calls[index].name] += 1
        points.append(replace(calls[index], order=counts[calls[index].name]))
    return points


def positions_of(calls: Sequence[Call], root: Path) -> list[int]:
    """Returns where in a trace the calls are that change something at or below `root`."""
    real = os.path.realpath(root)
    return [index for index, call in enumerate(calls) if _below(call.target(), real)]


def parse(text: str) -> list[Call]:
    """Reads strace's output (`-f -y -xx`) of a program with one thread.

    Raises:
        NotMeasured: Several threads' calls overlap; they have no one order.
    """
    counts: Counter[tuple[str, str]] = Counter()
    calls = []
    for line in text.splitlines():
        if "<unfinished ...>" in line and not line.rstrip().endswith("= ?"):
            raise NotMeasured("the traced program has calls of several threads at a time")
        if (found := _LINE.fullmatch(line)) is None:
            continue
        process, name, arguments, returned, rest = found.groups()
        counts[process, name] += 1
        calls.append(
            Call(
                name=name,
                nth=counts[process, name],
                arguments=tuple(arguments.split(", ")),
                returned=-1 if returned == "?" else int(returned),
                failed=returned == "?" or returned.startswith("-"),
                struck=returned == "?" or "(INJECTED)" in rest,
            )
        )
    return calls


def unescape(text: str) -> bytes:
    r"""Returns the bytes of strace's `\x41\x42`; a trailing "..." means the string was cut off.

    Raises:
        NotMeasured: The string was cut off.
    """
    if text.endswith("..."):
        raise NotMeasured("the traced program writes more at once than a trace keeps")
    if _TEXT.fullmatch(text):
        return bytes.fromhex(text.replace("\\x", ""))
    return text.encode("utf-8", "surrogateescape")


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(root + "/")


def _strace(trace: Path | str) -> list[str]:
    # Not --seccomp-bpf: with it, strace 6.1 puts no fault in and says nothing.
    return ["strace", "-f", "-qqq", "-o", str(trace)]
