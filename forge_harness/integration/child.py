"""Child processes in a group of their own: watched, logged, and ended with all they started."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from forge_harness.integration import lifeline
from forge_harness.probes.masking import Masker, settled
from forge_harness.rundir import is_full

_TERM_GRACE_S = 2.0
_READ_BYTES = 1 << 16
_LINES = 1000
_LONGEST_WAIT_BYTES = 1 << 20
_PYTEST_PREFIX = "PYTEST_"
_INHERITED = frozenset({"PYTEST_DEBUG_TEMPROOT"})
"""Where temporary directories go: a matter of the machine, not of a run."""


def scrubbed_environment() -> dict[str, str]:
    """Returns this process's environment as processes that run checks get it.

    What a user, or a pytest session around this process, sets for other pytest runs (plugins,
    options, xdist's worker) must not change what a validation does.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_PYTEST_PREFIX) or name in _INHERITED
    }


class Log:
    """Appends output to a file, and keeps its end; a full disk ends the file, not the run.

    Credentials are masked; what could be half of one is kept back until more comes, or `flush`.
    """

    def __init__(self, path: Path | None, *, keep: int = 8192) -> None:
        self._path = path
        self._keep = keep
        self._masker = Masker()
        self._tail = b""
        self._line = b""
        self._waiting = b""
        self._lines: list[str] = []
        self.saw_internal_error = False
        if path is not None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, data: bytes) -> None:
        """Appends bytes."""
        window = self._tail[-16:] + data
        self.saw_internal_error = self.saw_internal_error or b"INTERNALERROR>" in window
        self._tail = (self._tail + data)[-self._keep :]
        *whole, self._line = (self._line + data).split(b"\n")
        self._line = self._line[-self._keep :]
        self._lines = [*self._lines, *(line.decode("utf-8", "replace") for line in whole)][-_LINES:]
        self._waiting += data
        settled_bytes = settled(self._waiting)
        self._append(self._waiting[:settled_bytes])
        self._waiting = self._waiting[settled_bytes:]
        if len(self._waiting) > _LONGEST_WAIT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what was kept back."""
        self._append(self._waiting)
        self._waiting = b""

    def _append(self, data: bytes) -> None:
        if self._path is None or not data:
            return
        data = self._masker.data(data)
        try:
            with self._path.open("ab") as stream:
                stream.write(data)
        except OSError as error:
            if not is_full(error):
                raise
            self._path = None

    def take_lines(self) -> list[str]:
        """Returns the whole lines written since the last call (at most the last 1,000)."""
        lines, self._lines = self._lines, []
        return lines

    def last_line(self) -> str:
        """Returns the last line that is not empty."""
        lines = self.tail().strip().splitlines()
        return lines[-1].strip() if lines else ""

    def tail(self) -> str:
        """Returns the end of the output."""
        return self._masker.text(self._tail.decode("utf-8", errors="replace"))


class Child:
    """A running child process. Leaving the `with` block ends its whole group."""

    def __init__(self, command: Sequence[str], log: Log) -> None:
        environment = scrubbed_environment()
        watched, self._lifeline = os.pipe()
        environment[lifeline.VARIABLE] = str(watched)
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            # A group of its own: Ctrl-C reaches this process only, which then ends the group.
            start_new_session=True,
            pass_fds=(watched,),
        )
        os.close(watched)
        assert self._process.stdout is not None
        self._output: BinaryIO = self._process.stdout  # type: ignore[assignment]
        os.set_blocking(self._output.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._output, selectors.EVENT_READ)
        self._open = True
        self._log = log

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def pump(self, seconds: float) -> int | None:
        """Moves output to the log for a while; returns the exit status once there is one."""
        status = self._process.poll()
        self._drain(0.0 if status is not None else seconds)
        return status

    def end(self) -> None:
        """Ends what is left of the group, politely and then not, and closes the log."""
        self._signal(signal.SIGTERM if self._process.poll() is None else signal.SIGKILL)
        try:
            self._process.wait(_TERM_GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._drain(0.0)
        self._log.flush()
        self._selector.close()
        self._output.close()
        os.close(self._lifeline)

    def _signal(self, number: signal.Signals) -> None:
        # The child leads its group, so the group's id is its process id.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _drain(self, seconds: float) -> None:
        if not self._open:
            if seconds:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
            return
        while self._selector.select(seconds):
            seconds = 0.0
            data = self._output.read(_READ_BYTES)
            if data is None:
                return
            if not data:
                self._open = False
                self._selector.unregister(self._output)
                return
            self._log.write(data)


def describe_status(status: int) -> str:
    """Returns how a process ended, in words."""
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
    memory = ", often for memory" if name == "SIGKILL" else ""
    return f"killed by {name}{memory}"
