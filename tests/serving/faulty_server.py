"""A server with handles for faults: SIGUSR1 kills its inference thread, SIGUSR2 hangs it once.

Run as `python faulty_server.py --package DIR --port N [--step-s S] [--hang-s S] ...`: limits that
`forge-harness serve` does not offer.
"""

import argparse
import asyncio
import ctypes
import json
import signal
import sys
import time
from pathlib import Path

from forge_harness.serving.core import scheduler_of
from forge_harness.serving.guard import GuardSpec
from forge_harness.serving.package import load_served
from forge_harness.serving.server import ready_line, serve
from forge_harness.serving.settings import Settings


class Slow:
    """A scheduler whose steps take longer, and one of which may never end."""

    def __init__(self, inner, step_s, first_s):
        self.inner, self.step_s, self.first_s = inner, step_s, first_s
        self.by_cost, self.canary = inner.by_cost, inner.canary

    @property
    def busy(self):
        return self.inner.busy

    @property
    def room(self):
        return self.inner.room

    def step(self, jobs):
        if HANG:
            HANG.clear()
            time.sleep(30)
        time.sleep(self.step_s + self.first_s)
        self.first_s = 0.0
        return self.inner.step(jobs)


HANG = []


def kill(thread):
    """Ends a thread as nothing it catches does."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--first-s", type=float, default=0.0)
    parser.add_argument("--hang-s", type=float, default=5.0)
    parser.add_argument("--header-s", type=float, default=5.0)
    parser.add_argument("--body-s", type=float, default=5.0)
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--max-queue", type=int, default=256)
    parser.add_argument("--deadline-s", type=float, default=30.0)
    parser.add_argument("--keep-alive-s", type=float, default=75.0)
    parser.add_argument("--drain-s", type=float, default=30.0)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--audit", type=Path)
    parser.add_argument("--keys")
    given = parser.parse_args()
    served = load_served(given.package)
    settings = Settings(
        port=given.port,
        max_batch=given.max_batch,
        max_queue=given.max_queue,
        hang_s=given.hang_s,
        deadline_s=given.deadline_s,
        header_s=given.header_s,
        body_s=given.body_s,
        keep_alive_s=given.keep_alive_s,
        drain_s=given.drain_s,
        max_restarts=2,
    )

    def on_ready(server):
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, lambda: kill(server.core.engine.thread))
        loop.add_signal_handler(signal.SIGUSR2, lambda: HANG.append(True))
        sys.stdout.write(json.dumps(ready_line(server)) + "\n")
        sys.stdout.flush()

    def build():
        return Slow(scheduler_of(served, settings), given.step_s, given.first_s)

    guard = GuardSpec(given.tokens, given.audit, given.keys).open()
    return serve(served, settings, guard, on_ready=on_ready, build=build)


if __name__ == "__main__":
    raise SystemExit(main())
