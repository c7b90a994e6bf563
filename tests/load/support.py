"""A small plan, its records as a generator would write them, and the directory of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from forge_harness.load.plan import LoadPlan, phases_at
from forge_harness.load.records import Fate, Record
from forge_harness.load.schedule import arrivals, choices

SERVER = Path(__file__).parent / "server.py"
SHAPE = ((1, 3), (23, 1), (1, 4))
BASE = 40.0


@contextmanager
def serving(*options):
    """Starts tests/load/server.py and yields its address."""
    command = [sys.executable, str(SERVER), *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def plan_of(url="http://127.0.0.1:1", base=BASE, shape=SHAPE, **changed):
    return LoadPlan(url=url, phases=phases_at(base, shape), **{"seed": 1, **changed})


def served(plan, *, took=0.01, kinds=64):
    """Returns the records of a run in which everything was answered."""
    due = arrivals(plan.phases, plan.seed)
    chosen = choices(len(due), kinds, plan.seed)
    return [
        Record(
            i, t, kind, sent=t + 1e-4, first=t + took, done=t + took, status=200, fate=Fate.OK,
            request_id=f"r{i}", size=10,
        )
        for i, (t, kind) in enumerate(zip(due, chosen, strict=True))
    ]  # fmt: skip


def shed(record):
    return replace(record, status=503, fate=Fate.SHED, detail="status 503")


def silent(record):
    return replace(
        record, done=record.sent + 5, first=None, status=None, fate=Fate.TIMEOUT, detail="no answer"
    )


def counters(records, path="/v1/predict", scale=1):
    codes = Counter(r.status for r in records if r.status is not None)
    lines = [
        f'forge_requests_total{{route="{path}",code="{c}"}} {n * scale}' for c, n in codes.items()
    ]
    return "\n".join([*lines, "forge_requests_in_flight 0"])


def write_run(directory, plan, records, *, cpu=0.2, server=True, locust=None):
    """Writes what a run leaves behind, for these records."""
    directory.mkdir(parents=True, exist_ok=True)
    plan.write(directory)
    text = "".join(f"{record.line()}\n" for record in records)
    (directory / "records-0.jsonl").write_text(text, encoding="utf-8")
    times = [t / 2 for t in range(int(2 * plan.seconds) + 3)]
    told = {
        "worker": 0, "of": 1, "plan_digest": plan.digest, "cpu": [[t, cpu * t] for t in times],
    }  # fmt: skip
    (directory / "generator-0.json").write_text(json.dumps(told), encoding="utf-8")
    ended = [r for r in records if r.fate not in (Fate.DROPPED, Fate.CENSORED)]
    failed = sum(r.fate in (Fate.ERROR, Fate.TIMEOUT) for r in ended)
    counts = locust or {"requests": len(ended), "failures": failed}
    (directory / "locust.json").write_text(json.dumps(counts), encoding="utf-8")
    (directory / "memory.json").write_text("[[0.5, 5e7], [8.0, 5e7]]", encoding="utf-8")
    if server:
        (directory / "server-before.prom").write_text(counters([]), encoding="utf-8")
        (directory / "server-after.prom").write_text(counters(records), encoding="utf-8")
    return directory
