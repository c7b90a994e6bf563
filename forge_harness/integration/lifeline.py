"""Ends a child process, and all it started, when the process that started it is gone.

A parent that is killed cannot end its children. They hold the read end of a pipe whose write end
only the parent has, so they see its death as an end of file.
"""

from __future__ import annotations

import os
import signal
import threading

VARIABLE = "_FORGE_LIFELINE"


def watch() -> None:
    """Starts watching the pipe a parent gave, if one did."""
    given = os.environ.pop(VARIABLE, None)
    if given is not None:
        threading.Thread(target=_wait, args=(int(given),), daemon=True).start()


def _wait(descriptor: int) -> None:
    try:
        os.read(descriptor, 1)
    except OSError:
        return
    os.killpg(os.getpgrp(), signal.SIGKILL)
