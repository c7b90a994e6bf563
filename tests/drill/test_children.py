"""Child programs do not outlive the block that started them, whenever it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from forge_harness.drill import children
from forge_harness.integration.stops import interrupted_once

SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_a_signal_while_a_child_is_started_leaves_none(monkeypatch):
    """It went on, and wrote to a directory that had been removed meanwhile."""
    begun: list[subprocess.Popen[bytes]] = []
    real = children.start

    def start(command):
        begun.append(real(command))
        os.kill(os.getpid(), signal.SIGTERM)
        return begun[0]

    def work():
        with interrupted_once(), children.killed_at_end(SLEEPS):
            time.sleep(60)

    monkeypatch.setattr(children, "start", start)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert begun[0].returncode == -signal.SIGKILL
