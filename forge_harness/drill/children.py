"""Starting the child programs, and reading what they acknowledged."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import forge_harness
from forge_harness.integration.stops import delayed

TIMEOUT_S = 60.0
"""A child needs far less than a second of processor time; a loaded machine may stretch that."""


@dataclass(slots=True)
class Session:
    """What a writer said it did."""

    base: int = 0
    """Round that was committed before it started."""
    begun: list[int] = field(default_factory=list)
    acked: dict[int, int] = field(default_factory=dict)
    """Round -> generation."""
    errors: list[str] = field(default_factory=list)

    @property
    def last_acked(self) -> int:
        """The newest round whose commit returned."""
        return max(self.acked, default=self.base)

    def allowed(self) -> list[int]:
        """Rounds a store may show now, newest first: the last acknowledged, or begun after it."""
        later = [round_ for round_ in self.begun if round_ > self.last_acked]
        return [*sorted(later, reverse=True), self.last_acked]


def session_of(output: bytes, *, base: int = 0) -> Session:
    """Reads a writer's output; a last line that was cut off does not count."""
    session = Session(base)
    for line in output.decode("utf-8", "replace").split("\n")[:-1]:
        word, _, rest = line.partition(" ")
        if word == "begin":
            session.begun.append(int(rest))
        elif word == "ack":
            round_, generation = rest.split()
            session.acked[int(round_)] = int(generation)
        elif word in ("error", "failed"):
            session.errors.append(rest)
    return session


def program(module: str, *arguments: object) -> list[str]:
    """Returns the command line of a child program.

    The interpreter itself, not the shim or symbolic link it was started by, and without `site`:
    both make system calls that would be counted as the store's.
    """
    base = getattr(sys, "_base_executable", None) or sys.executable
    command = [os.path.realpath(base), "-S", "-B", "-P", "-m", f"forge_harness.drill.{module}"]
    return [*command, *(str(argument) for argument in arguments)]


def writer(root: Path, opener: str, **options: object) -> list[str]:
    """Returns the command line of a writer; options as `storage_writer` takes them."""
    flags: list[object] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [] if value is False else [flag, value]
    return program("storage_writer", root, opener, *flags)


def cached_in(command: Sequence[str], directory: Path) -> list[str]:
    """Returns a program's command line with a byte code cache that no other process writes to.

    Where a module has no byte code, an interpreter opens one more file; another process that
    imports the module meanwhile changes that from one run of the program to the next.
    """
    return [command[0], "-X", f"pycache_prefix={directory}", *command[1:]]


def fill_cache(command: Sequence[str]) -> None:
    """Runs a program of `cached_in` once, so that its modules' byte code is there."""
    run([part for part in command if part != "-B"])


def environment() -> dict[str, str]:
    """Returns the variables of a child: it imports what this process imports."""
    package = str(Path(forge_harness.__file__).resolve().parents[1])
    own = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    own |= {os.path.join(path, "lib-dynload") for path in own}
    # In the order of this process, in which a `types.py` beside somebody's store comes after that
    # of the library: PYTHONPATH alone would have it in front.
    paths = [path for path in sys.path if os.path.isdir(path)]
    after = 1 + max((n for n, path in enumerate(paths) if path in own), default=-1)
    paths.insert(after, package)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE"))}
    return {**kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONHASHSEED": "0"}


def run(command: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> tuple[int, bytes, bytes]:
    """Runs a child to its end and returns status, output and error output.

    Raises:
        TimeoutError: It did not end; it and all it started were killed.
    """
    with killed_at_end(command) as child:
        try:
            out, err = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{command[0]} did not end within {timeout_s:g} s") from error
    return child.returncode, out, err


def problem_of(opener: str) -> str:
    """Returns why no child program can write to a store of an opener; "" when one can.

    A campaign whose writers write nothing would find nothing lost.
    """
    with tempfile.TemporaryDirectory(prefix="forge-opener-") as scratch:
        try:
            _, output, said = run(writer(Path(scratch) / "store", opener))
        except TimeoutError as error:
            return f"the store opener {opener!r} hangs in a fresh process: {error}"
    session = session_of(output)
    if session.acked:
        return ""
    lines = session.errors or said.decode("utf-8", "replace").split("\n")
    why = next((line for line in reversed(lines) if line.strip()), "it ended without a word")
    return (
        f"the store opener {opener!r} makes no store that takes a commit in a fresh process: {why}"
    )


@contextlib.contextmanager
def killed_at_end(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a child that does not outlive the block, however that ends.

    An interrupt of the drill does not reach it, as it has a process group of its own.
    """
    with contextlib.ExitStack() as stack:
        # A signal between its start and the note of it left a child that wrote to a directory that
        # was removed meanwhile, and made it anew.
        with delayed():
            child = stack.enter_context(start(command))
            stack.callback(_end, child)
        yield child


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        kill(child)


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts a child in a process group of its own."""
    return subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        start_new_session=True,
    )


def kill(child: subprocess.Popen[bytes]) -> None:
    """Kills a child and all it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
