"""Progress of a run on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, cast

from forge_harness.cli.terminal import Spare, is_plain, say

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from forge_harness.integration.pipeline_validator import Progress, ProgressCallback

_TITLES = {"study": "training", "checks": "checks"}
_LINE_EVERY_S = 10.0
"""Often enough that a CI log shows life, seldom enough that it stays readable."""
_BAD = frozenset({"fail", "error", "xpass"})


@contextmanager
def progress_of(quiet: bool) -> Iterator[ProgressCallback | None]:
    """Yields what a run tells its progress to; None when nobody wants to see it."""
    if quiet:
        yield None
    elif is_plain(sys.stderr):
        yield PlainProgress()
    else:
        with _bar() as bar:
            yield _told_to(bar)


@contextmanager
def counted(quiet: bool) -> Iterator[Callable[[str, int, int, str], None] | None]:
    """Yields what is told (stage, done, total, label); None when nobody wants to see it."""
    from forge_harness.integration.pipeline_validator import Progress

    with progress_of(quiet) as told:
        if told is None:
            yield None
        else:
            yield lambda stage, done, total, label: told(
                Progress(stage=stage, done=done, total=total, label=label)
            )


class PlainProgress:
    """Prints a line at the start and end of a stage, for each bad outcome, and now and then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._outcomes: Counter[str] = Counter()

    def __call__(self, progress: Progress) -> None:
        """Takes one step."""
        outcome = "" if progress.outcome is None else progress.outcome.value
        self._outcomes[outcome] += bool(outcome)
        if outcome in _BAD:
            say(f"  {outcome}: {progress.label}")
        due = self._clock() - self._last >= _LINE_EVERY_S
        if due or progress.done in (1, progress.total):
            self._last = self._clock()
            say(self._line(progress))

    def _line(self, progress: Progress) -> str:
        title = _TITLES.get(progress.stage, progress.stage)
        counts = ", ".join(
            f"{count} {name.replace('_', ' ')}" for name, count in self._outcomes.items() if count
        )
        tail = f" ({counts})" if counts else f" ({progress.label})"
        return f"{title} {progress.done}/{progress.total}{tail}"


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[label]}", markup=False),
        # Rich ends the process when its output cannot be written; the run must not end with it.
        console=Console(file=cast("TextIO", Spare(sys.stderr))),
    )


def _told_to(bar: Bar) -> ProgressCallback:
    tasks: dict[str, TaskID] = {}

    def tell(progress: Progress) -> None:
        if progress.stage not in tasks:
            title = _TITLES.get(progress.stage, progress.stage)
            tasks[progress.stage] = bar.add_task(title, total=progress.total, label="")
        outcome = None if progress.outcome is None else progress.outcome.value
        if outcome in _BAD:
            bar.console.print(f"{outcome}: {progress.label}", style="red", markup=False)
        bar.update(
            tasks[progress.stage],
            completed=progress.done,
            total=progress.total,
            label=progress.label,
        )

    return tell
