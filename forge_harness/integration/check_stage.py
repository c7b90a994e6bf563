"""Runs the checks of a plan in a pytest process and records what it tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forge_harness.imports import python_program
from forge_harness.integration.child import Child, Log, describe_status
from forge_harness.integration.pytest_events import Events
from forge_harness.paths import suites_dir
from forge_harness.record import ItemRecord

HANG_GRACE_S = 30.0
"""pytest-timeout ends a check at its limit from inside. Code that never returns to Python (a lock
in C) is ended from outside this much later, together with the run."""
STALL_S = 300.0
"""Longest time in which nothing starts or ends while nothing runs: collection, or the way out.
Collecting all suites takes 5 s on 2 idle cores, most of it importing torch."""
DEFAULT_LIMIT_S = 1200.0
"""Of a test without a check id, which no catalogue gives a limit."""
_POLL_S = 0.1


def pytest_command(paths: Sequence[Path], *options: str) -> list[str]:
    """Returns the command that runs checks with the settings that ship with the suites."""
    suites = suites_dir()
    base = [*python_program("forge_harness._pytest"), "-c", str(suites / "pytest.ini")]
    base += ["--rootdir", str(suites), "--color=no", "--timeout", f"{DEFAULT_LIMIT_S:g}"]
    return [*base, *options, *map(str, paths)]


@dataclass(frozen=True, slots=True)
class StageEnd:
    """How the checks came to an end; `problem` is empty when all of them did."""

    problem: str = ""


@dataclass(slots=True)
class CheckStage:
    """One pytest process over the selected checks.

    Args:
        command: From `pytest_command`.
        events: File the process writes its events to.
        log: File its output goes to.
        limits: Check id -> seconds one of its items may take, where it has no marker of its own.
        deadline: Monotonic time at which the run must end, or None.
        on_item: Told of each item that ended.
        stop: Returns why the run should end now, or None.
    """

    command: Sequence[str]
    events: Path
    log: Path
    limits: Mapping[str, float]
    deadline: float | None
    on_item: Callable[[ItemRecord], None]
    stop: Callable[[], str | None]
    reader: Events = field(init=False)

    def __post_init__(self) -> None:
        self.reader = Events(self.events, self.on_item)

    def run(self) -> StageEnd:
        """Runs the process to its end, or ends it at the deadline or when a check hangs.

        Every collected item is accounted for in the end: also on KeyboardInterrupt, which is
        raised again.
        """
        log = Log(self.log)
        hung: dict[str, str] = {}
        problem = "the run was interrupted"
        try:
            with Child(self.command, log) as child:
                problem, status = self._watch(child, hung)
            self.reader.read()
            if status is not None:
                problem = self._judge(status, log)
        finally:
            self.reader.read()
            missing = self.reader.close(hung=hung, reason=problem or "never reported")
        if missing and not problem:
            problem = f"{missing} collected test(s) were never reported"
        return StageEnd(problem)

    def _watch(self, child: Child, hung: dict[str, str]) -> tuple[str, int | None]:
        """Returns why the process was ended from here, or its own exit status."""
        while True:
            status = child.pump(_POLL_S)
            self.reader.read()
            if status is not None:
                return "", status
            problem = self.stop() or self._overdue(hung)
            if problem is not None:
                return problem, None

    def _overdue(self, hung: dict[str, str]) -> str | None:
        now = time.monotonic()
        if self.deadline is not None and now >= self.deadline:
            for nodeid, since in self.reader.running.items():
                hung[nodeid] = (
                    f"timed out: running for {now - since:.0f} s when the run's time was up"
                )
            return "the run's time was up before this check ended"
        for nodeid, since in self.reader.running.items():
            limit = self._limit(nodeid)
            if now - since > limit + HANG_GRACE_S:
                hung[nodeid] = f"timed out after {limit:g} s and could not be stopped"
                return f"{nodeid} hung and was ended together with the run"
        if not self.reader.running and now - self.reader.last_event > STALL_S:
            doing = "ending" if self.reader.ended else "collecting"
            return f"pytest hung while {doing}: nothing happened for {STALL_S:g} s"
        return None

    def _limit(self, nodeid: str) -> float:
        mark = self.reader.marks.get(nodeid)
        if mark is None:
            return DEFAULT_LIMIT_S
        # The limit that is kept inside: a check must not be ended here before it is ended there.
        return mark.get("timeout_s") or self.limits.get(mark["check"], DEFAULT_LIMIT_S)

    def _judge(self, status: int, log: Log) -> str:
        """Returns why a process that ended by itself did not run all checks, or nothing."""
        finished = self.reader.finished
        if finished is None:
            said = f": {log.last_line()}" if log.last_line() else ""
            return f"the pytest process ended early ({describe_status(status)}){said}"
        if finished["error"] is not None or log.saw_internal_error:
            return f"pytest broke down: {finished['error'] or 'INTERNALERROR in a worker'}"
        if finished["lost"]:
            return f"{finished['lost']} collected test(s) did not run: {finished['reason']}"
        if not self.reader.marks:
            return f"no check was collected ({describe_status(status)}): {log.last_line()}"
        return ""
