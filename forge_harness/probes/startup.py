"""What starting a Python program imports, and how long it takes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

_PREFIX = "import time:"


@dataclass(frozen=True, slots=True)
class StartReading:
    """One start of a fresh interpreter."""

    exit_code: int
    seconds: float
    """Wall clock from start to end of the process, interpreter included."""
    modules: frozenset[str]
    """Top-level names of every module imported, by `-X importtime`."""
    error: str
    """End of what it wrote about a failure."""


def start(arguments: Sequence[str], *, timeout_s: float = 60) -> StartReading:
    """Runs `python ARGUMENTS` to its end and returns what it imported on the way.

    Raises:
        subprocess.TimeoutExpired: It did not end in time.
    """
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    seconds = time.monotonic() - began
    lines = done.stderr.splitlines()
    names = (line.rpartition("|")[2].strip() for line in lines if line.startswith(_PREFIX))
    said = [line for line in lines if not line.startswith(_PREFIX)]
    return StartReading(
        exit_code=done.returncode,
        seconds=seconds,
        modules=frozenset(name.partition(".")[0] for name in names if name),
        error=" ".join(said[-2:])[-200:],
    )
