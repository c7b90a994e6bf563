"""How long the threads of this process were ready and had no core, as Linux counts it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

TASKS = Path("/proc/self/task")


def waits_of_threads(tasks: Path = TASKS) -> dict[str, int] | None:
    """Returns how many nanoseconds each thread has waited for a core since it began.

    Returns:
        Thread id -> nanoseconds: the second number of `schedstat` (Linux, Documentation/scheduler/
        sched-stats.rst). None where the system keeps no such count: no file, or zeros alone, also
        for the time that this process ran.
    """
    found, ran = {}, 0
    try:
        for task in tasks.iterdir():
            try:
                text = (task / "schedstat").read_text(encoding="ascii")
            except (FileNotFoundError, ProcessLookupError):  # ended since it was listed
                continue
            run, wait = map(int, text.split()[:2])
            found[task.name] = wait
            ran += run
    except (OSError, ValueError):
        return None
    return found if ran else None


def waited(before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """Returns the nanoseconds that all threads waited between two readings, those begun since too.

    What a thread waited that ended in between is not known.
    """
    return sum(waits - before.get(task, 0) for task, waits in after.items())
