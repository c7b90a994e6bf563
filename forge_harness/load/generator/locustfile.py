"""The locustfile of `forge-harness load`; also for `locust -f` by hand (docs/load.md).

Locust gives the process, its web page, and the split over workers. When requests are sent is not
Locust's: the schedule of the plan in FORGE_LOAD_PLAN is, and the number of users changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from gevent.fileobject import FileObject
from locust import User, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from forge_harness.load.generator.openloop import OpenLoop
from forge_harness.load.plan import SIGN, LoadPlan, read_plan
from forge_harness.load.records import Fate, Record
from forge_harness.load.traffic import Request
from forge_harness.load.validity import generator_problems

INVALID = 3
"""Exit status when the generator could not keep the schedule."""
_STOP_S = 5.0
"""For writing what became of the requests of a plan that is stopped."""
_LEAD_S = 0.3
_LEAD_APART_S = 3.0
"""Between telling workers to start and the start; a message may take a moment."""


class OpenLoopUser(User):
    """What Locust counts as a user. Requests come from the schedule, not from it."""

    fixed_count = 1

    @task
    def wait(self) -> None:
        """Stays until the run ends."""
        gevent.sleep(3600)
        raise StopUser


class _Share:
    """What this process does of a plan, and what it says about it."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.loop: OpenLoop | None = None

    def run(self, plan: LoadPlan, directory: Path, *, worker: int, of: int, start: float) -> None:
        before = _locust_counts(self.environment)
        loop = OpenLoop(plan, directory, worker=worker, of=of, told=self._tell_locust)
        self.loop = loop
        ticker = gevent.spawn(self._tick, loop)
        stopped_at = None
        try:
            # Preparing a long schedule takes a while; the lead is from when it is ready.
            loop.run(start if start else time.monotonic() + _LEAD_S)
        except gevent.GreenletExit:
            stopped_at = round(loop.now(), 2)
            raise
        finally:
            ticker.kill()
            self.loop = None
            self._conclude(loop, directory, worker=worker, of=of, stopped_at=stopped_at)
            if isinstance(self.environment.runner, LocalRunner):
                _write_locust_counts(self.environment, directory, before)

    def _conclude(
        self, loop: OpenLoop, directory: Path, *, worker: int, of: int, stopped_at: float | None
    ) -> None:
        problems = generator_problems(loop.records, loop.cpu, loop.plan)
        counts = {fate.value: 0 for fate in Fate}
        for record in loop.records:
            counts[record.fate.value] += 1
        content = {
            "worker": worker,
            "of": of,
            "plan_digest": loop.plan.digest,
            "scheduled": len(loop.records),
            "counts": counts,
            "cpu": [[round(t, 3), round(cpu, 3)] for t, cpu in loop.cpu],
            "problems": problems,
            "stopped_at": stopped_at,
        }
        path = directory / f"generator-{worker}.json"
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        if problems:
            self.environment.process_exit_code = INVALID

    def _tell_locust(self, request: Request, record: Record) -> None:
        failed = record.fate in (Fate.ERROR, Fate.TIMEOUT)
        name = request.path if record.fate is not Fate.SHED else f"{request.path} (shed)"
        self.environment.events.request.fire(
            request_type=request.method,
            name=name,
            response_time=1000 * ((record.done or 0.0) - record.intended),
            response_length=record.size,
            exception=RuntimeError(record.detail) if failed else None,
            context={},
        )

    def _tick(self, loop: OpenLoop) -> None:
        while True:
            _say(
                {
                    "event": "progress",
                    "t": round(loop.now(), 2),
                    "phase": loop.phase,
                    "sent": loop.position,
                    "scheduled": len(loop.records),
                }
            )
            gevent.sleep(0.5)


def _locust_counts(environment: Environment) -> tuple[int, int]:
    total = environment.stats.total
    return total.num_requests, total.num_failures


def _write_locust_counts(
    environment: Environment, directory: Path, before: tuple[int, int] = (0, 0)
) -> None:
    requests, failures = _locust_counts(environment)
    content = {"requests": requests - before[0], "failures": failures - before[1]}
    (directory / "locust.json").write_text(json.dumps(content), encoding="utf-8")


def _say(message: dict[str, Any]) -> None:
    if "FORGE_LOAD_SESSION" in os.environ:
        # Nobody listens any more when the parent was killed; the end of input ends the plan.
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(f"{SIGN}{json.dumps(message)}\n")
            sys.stdout.flush()


def _runner(environment: Environment) -> Any:  # noqa: ANN401 - a runner of any kind
    assert environment.runner is not None
    return environment.runner


def _plan() -> tuple[LoadPlan, Path]:
    path = Path(os.environ.get("FORGE_LOAD_PLAN", "plan.json")).resolve()
    return read_plan(path), path.parent


# ---- a session of the parent process: one plan after another, named on standard input


def _serve_parent(environment: Environment) -> None:
    share = _Share(environment)
    plan: gevent.Greenlet | None = None
    _say({"event": "ready"})
    # Read while a plan runs: the end of input is the end of the parent, and of the load with it.
    for line in FileObject(sys.stdin.fileno(), "r", close=False):
        plan = gevent.spawn(_run_for_parent, share, Path(json.loads(line)["plan"]))
    if plan is not None:
        plan.kill(timeout=_STOP_S)
    _runner(environment).quit()


def _run_for_parent(share: _Share, path: Path) -> None:
    try:
        share.run(read_plan(path), path.parent, worker=0, of=1, start=0.0)
        _say({"event": "done"})
    except Exception as error:
        _say({"event": "failed", "error": f"{type(error).__name__}: {error}"})


# ---- by hand: one plan, from FORGE_LOAD_PLAN; alone, or as master and workers


class _ByHand:
    """Starts the plan when Locust's test starts, on this process or on all workers."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.share = _Share(environment)
        self.greenlet: gevent.Greenlet | None = None
        self.waiting: set[str] = set()
        runner = environment.runner
        if isinstance(runner, WorkerRunner):
            runner.register_message("forge_share", self._take_share)
        elif isinstance(runner, MasterRunner):
            runner.register_message("forge_done", self._worker_done)
        events.test_stop.add_listener(self._stopped)
        events.quit.add_listener(self._quit)

    def test_starts(self) -> None:
        """Starts here, or tells every worker its share."""
        runner = self.environment.runner
        if isinstance(runner, MasterRunner):
            plan, _ = _plan()
            workers = [*runner.clients.ready, *runner.clients.spawning, *runner.clients.running]
            self.waiting = {worker.id for worker in workers}
            start = time.time() + _LEAD_APART_S
            for index, worker in enumerate(workers):
                told = {"worker": index, "of": len(workers), "start": start, "digest": plan.digest}
                runner.send_message("forge_share", told, worker.id)
            self.greenlet = gevent.spawn(self._wait_for_workers, runner)
        elif isinstance(runner, LocalRunner):
            self.greenlet = gevent.spawn(self._run_here)

    def _run_here(self) -> None:
        plan, directory = _plan()
        self.share.run(plan, directory, worker=0, of=1, start=0.0)
        self._end()

    def _take_share(self, environment: Environment, msg: Any, **_: Any) -> None:  # noqa: ANN401
        self.greenlet = gevent.spawn(self._run_share, dict(msg.data))

    def _run_share(self, told: dict[str, Any]) -> None:
        runner = _runner(self.environment)
        plan, directory = _plan()
        problem = ""
        if plan.digest != told["digest"]:
            problem = f"{directory} holds another plan than the master's"
        else:
            lead = told["start"] - time.time()
            self.share.run(
                plan,
                directory,
                worker=told["worker"],
                of=told["of"],
                start=time.monotonic() + lead,
            )
        runner.send_message("forge_done", {"problem": problem})

    def _worker_done(self, environment: Environment, msg: Any, **_: Any) -> None:  # noqa: ANN401
        if msg.data.get("problem"):
            sys.stderr.write(f"{msg.node_id}: {msg.data['problem']}\n")
            self.environment.process_exit_code = INVALID
        self.waiting.discard(msg.node_id)

    def _wait_for_workers(self, runner: MasterRunner) -> None:
        while self.waiting:
            gevent.sleep(0.2)
            # A worker that is gone will not say that it is done.
            self.waiting &= {worker.id for worker in runner.clients.values()}
        self._end()

    def _end(self) -> None:
        runner = _runner(self.environment)
        options = self.environment.parsed_options
        if options is not None and options.headless:
            gevent.spawn(runner.quit)
        else:
            gevent.spawn(runner.stop)

    def _stopped(self, **_: Any) -> None:  # noqa: ANN401
        if self.greenlet is not None and self.share.loop is not None:
            # Stopped by hand: what is in flight is written as censored.
            self.greenlet.kill(block=True)
        self._write_counts()

    def _quit(self, **_: Any) -> None:  # noqa: ANN401
        self._write_counts()

    def _write_counts(self) -> None:
        if isinstance(self.environment.runner, MasterRunner):
            _write_locust_counts(self.environment, _plan()[1])


_by_hand: _ByHand | None = None


@events.init.add_listener
def _on_init(environment: Environment, **_: Any) -> None:  # noqa: ANN401
    global _by_hand
    if "FORGE_LOAD_SESSION" in os.environ:
        gevent.spawn(_serve_parent, environment)
    else:
        _plan()  # A plan that cannot be read is said now, not when the test starts.
        _by_hand = _ByHand(environment)


@events.test_start.add_listener
def _on_test_start(**_: Any) -> None:  # noqa: ANN401
    if _by_hand is not None:
        _by_hand.test_starts()
