"""Small runs in a directory, as the tests of what makes them need them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from forge_harness.protocols import StepRecord, TrainOptions

OPTIONS = TrainOptions(steps=6, batch_size=16)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def interrupt_at(step: int, number: signal.Signals):
    def on_step(record: StepRecord, _: int) -> None:
        if record.step == step:
            os.kill(os.getpid(), number)

    return on_step
