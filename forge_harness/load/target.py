"""A server in a process of its own, from its start to its end."""

from __future__ import annotations

import http.client
import json
import selectors
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

    def stop(self) -> int:
        """Ends it by SIGTERM; returns its exit status once it has gone."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_S)


@contextmanager
def started(command: Sequence[str], *, start_s: float = START_S) -> Iterator[Target]:
    """Starts a server and yields it when it is ready; it is gone afterwards.

    Args:
        command: Prints a line of JSON with `url` on standard output when it is ready.
        start_s: Longest wait for that line, in seconds.

    Raises:
        LoadError: It ended, or did not say so in time; with the last thing it said.
    """
    with tempfile.TemporaryFile() as errors:
        started_at = time.monotonic()
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        )
        try:
            yield Target(_url(process, errors, start_s), process, started_at)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _url(process: subprocess.Popen[bytes], errors: IO[bytes], start_s: float) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + start_s
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(max(0.0, deadline - time.monotonic())):
            raise LoadError(f"The server did not say that it is ready within {start_s:g} s.")
    line = process.stdout.readline()
    try:
        return str(json.loads(line)["url"])
    except (ValueError, KeyError, TypeError) as error:
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip().splitlines()
        raise LoadError(
            f"The server ended before it was ready: {said[-1] if said else line!r}"
        ) from error
