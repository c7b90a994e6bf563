"""A server in a process of its own, from its start to its end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from forge_harness.errors import LoadError

from .metrics import direct
from .traffic import Request

START_S = 90.0
END_S = 40.0
_POLL_S = 0.005
_MOST_BYTES = 1 << 20
"""Of standard output, in which the line must be that says where the server is."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server that has said that it is ready.

    Attributes:
        url: Its address.
        process: Its process.
        started_at: `time.monotonic()` before its process was started.
    """

    url: str
    process: subprocess.Popen[bytes]
    started_at: float

    def first_answer_s(self, request: Request) -> float | None:
        """Sends a request; returns seconds from the start of the process to its whole answer.

        None when there is no answer. To be asked first, before anything is warm.
        """
        asked = urllib.request.Request(
            self.url + request.path,
            data=request.body,
            method=request.method,
            headers={"Content-Type": "application/json"},
        )
        try:
            with direct().open(asked, timeout=START_S) as answer:
                answer.read()
        except (OSError, http.client.HTTPException):
            return None
        return time.monotonic() - self.started_at

    def stop(self, *, end_s: float = END_S) -> int:
        """Ends it by SIGTERM; returns its exit status once it has gone.

        One that has not after `end_s` seconds is killed, and its status says so: -9.
        """
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(end_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextmanager
def started(command: Sequence[str], *, start_s: float = START_S) -> Iterator[Target]:
    """Starts a server and yields it when it is ready; it is gone afterwards.

    What it writes goes to files: a pipe that nobody reads would be full after some hundred lines
    of a log, and the server would stand still in the middle of the load.

    Args:
        command: Prints a line of JSON with `url` on standard output when it is ready; lines of
            another kind may come before and after it.
        start_s: Longest wait for that line, in seconds.

    Raises:
        LoadError: It ended, or did not say so in time; with the last thing it said.
    """
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        started_at = time.monotonic()
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=said, stderr=errors
        )
        try:
            yield Target(_url(process, said, errors, start_s), process, started_at)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _url(
    process: subprocess.Popen[bytes], said: IO[bytes], errors: IO[bytes], start_s: float
) -> str:
    deadline = time.monotonic() + start_s
    while True:
        has_ended = process.poll() is not None
        # Not by seeking: the server writes where this file stands.
        lines = os.pread(said.fileno(), _MOST_BYTES, 0).split(b"\n")
        for line in lines[:-1]:
            if (url := _url_in(line)) is not None:
                return url
        if has_ended:
            errors.seek(0)
            last = _last_line(errors.read()) or _last_line(b"\n".join(lines))
            raise LoadError(f"The server ended before it was ready: {last or 'it said nothing'}")
        if time.monotonic() > deadline:
            raise LoadError(
                f"The server did not say that it is ready within {start_s:g} s; expected a line of "
                "JSON with its url on standard output."
            )
        time.sleep(_POLL_S)


def _url_in(line: bytes) -> str | None:
    """Returns the address that a line of a server says it is ready at; None for another line."""
    try:
        return str(json.loads(line)["url"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _last_line(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""
