"""The inference thread: watched by the event loop, replaced when it dies or hangs, N times at most.

The thread never touches what belongs to the event loop; it hands over deliveries. A thread that was
replaced and wakes up finds its generation over, so it can neither take a job nor answer one twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .estimate import StepTime
from .health import Health, State
from .jobs import Delivery, Inbox, Job, StaleError
from .metrics import Metrics
from .problems import DEADLINE, INFERENCE_FAILED, NOT_READY, Problem
from .settings import Settings

IDLE_S = 0.2
"""Longest the thread sleeps between two heartbeats."""
_COMPANY = 4
"""Jobs of a step from which the next one waits for more: two or three that came together by chance
are no load, and would each pay the window for nothing."""
_TRUSTED_S = 1.0
"""How long it is believed what steps took when none is taken any more."""
_WATCH_S = 0.1
_START_S = 60.0

_log = logging.getLogger(__name__)


class CanaryError(Exception):
    """The model no longer answers what it answered when it was loaded."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a step gave.

    Attributes:
        deliveries: For the event loop.
        work: Rows, or sequences, computed together.
        jobs: Jobs they belong to.
        tokens: Tokens generated, whether or not the text they belong to is ever whole.
    """

    deliveries: list[Delivery]
    work: int
    jobs: int
    tokens: int = 0


class Scheduler(Protocol):
    """Turns jobs into deliveries, step by step; made anew in every inference thread."""

    by_cost: bool

    @property
    def busy(self) -> int:
        """Work begun and not done."""
        ...

    @property
    def room(self) -> int:
        """How much more may be taken now."""
        ...

    def step(self, jobs: Sequence[Job]) -> Step:
        """Takes jobs in and computes one step of all it has.

        An input that cannot be computed ends its own job with a problem and no other.
        """
        ...

    def canary(self) -> None:
        """Infers something whose answer is known.

        Raises:
            CanaryError: The answer is another one.
        """
        ...


class Engine:
    """Runs a scheduler in a thread of its own.

    Args:
        build: Makes the scheduler; called in the thread.
        capacity: Most work of one step.
        settings: Limits.
        health: Told about the thread.
        metrics: Counts.
        on_restart: Called in the event loop before a thread is replaced, with why.
    """

    def __init__(
        self,
        build: Callable[[], Scheduler],
        *,
        capacity: int,
        settings: Settings,
        health: Health,
        metrics: Metrics,
        on_restart: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._build, self._settings = build, settings
        self._health, self._metrics, self._on_restart = health, metrics, on_restart
        self.inbox, self.step_time = Inbox(), StepTime(capacity)
        self.thread: threading.Thread | None = None
        self._busy = 0
        self._beat = 0.0
        self._is_up = False
        self._error: BaseException | None = None
        self._stopping = threading.Event()
        self._restarts: deque[float] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the thread and its watcher; the server is ready when the canary has answered."""
        self._loop = asyncio.get_running_loop()
        self._start_thread()
        self._watcher = self._loop.create_task(self._watch())

    async def stop(self) -> None:
        """Ends the watcher and the thread, if it still listens."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self.thread is not None:
            await asyncio.to_thread(self.thread.join, self._settings.stall_s)

    def submit(self, job: Job) -> None:
        """Queues a job; its future ends by the result, a problem, or the deadline."""
        if self._loop is None:
            raise RuntimeError("The engine was not started.")
        timer = self._loop.call_later(
            max(0.0, job.deadline - time.monotonic()), self.abandon, job, _deadline_problem()
        )
        job.future.add_done_callback(lambda _: timer.cancel())
        self.inbox.put(job)

    def abandon(self, job: Job, problem: Problem) -> None:
        """Ends a job from the event loop: the deadline has passed, or the client has left."""
        job.is_over = True
        self.inbox.discard(job)
        if not job.future.done():
            job.future.set_exception(problem)

    def wait_s(self, cost: int, steps: int) -> float:
        """Returns the seconds a request of this work would take from now."""
        return self.step_time.wait_s(self.inbox.waiting_cost + self._busy, cost, steps)

    def starts_over(self, now: float) -> bool:
        """Forgets what steps took, if nothing is done and nothing was for a while; returns whether.

        Asked when a request would be refused for it. One slow step could otherwise have an idle
        server refuse everything for ever: what is not let in corrects no estimate.

        Args:
            now: On the monotonic clock.
        """
        is_idle = not (self._busy or len(self.inbox) or self.inbox.taken)
        if not is_idle or now - self.step_time.at <= _TRUSTED_S:
            return False
        self.step_time = StepTime(self.step_time.capacity)
        return True

    def _start_thread(self) -> None:
        generation, lost = self.inbox.successor()
        self._refuse(
            lost,
            Problem(
                INFERENCE_FAILED,
                "The inference thread ended while it worked on the request; send it again.",
                retry_after_s=1.0,
            ),
        )
        self._busy, self._is_up, self._error = 0, False, None
        self._beat = time.monotonic()
        self.thread = threading.Thread(
            target=self._run, args=(generation,), name=f"inference-{generation}", daemon=True
        )
        self.thread.start()

    def _run(self, generation: int) -> None:
        try:
            self._serve(generation)
        except StaleError:
            return
        except BaseException as error:
            self._error = error
            _log.error("The inference thread ended: %r", error)

    def _serve(self, generation: int) -> None:
        scheduler = self._build()
        scheduler.canary()
        checked = time.monotonic()
        self._is_up = True
        company = False
        while not self._stopping.is_set():
            self._beat = now = time.monotonic()
            if now - checked > self._settings.canary_s:
                scheduler.canary()
                checked = now
            jobs = self.inbox.take(
                generation,
                room=scheduler.room,
                by_cost=scheduler.by_cost,
                wait_s=0.0 if scheduler.busy else IDLE_S,
                window_s=self._settings.window_s if company and not scheduler.busy else 0.0,
            )
            if jobs or scheduler.busy:
                company = self._step(scheduler, jobs) >= _COMPANY

    def _step(self, scheduler: Scheduler, jobs: Sequence[Job]) -> int:
        """Computes one step; returns how many jobs were in it."""
        start = self._beat = time.monotonic()
        late = [job for job in jobs if not job.is_over and job.deadline <= start]
        kept = [job for job in jobs if not job.is_over and job.deadline > start]
        over = [job for job in jobs if job.is_over]
        for job in kept:
            job.started = start
        self._busy = scheduler.busy + sum(job.cost for job in kept)
        deliveries = [Delivery(job, problem=_deadline_problem()) for job in late]
        if kept or scheduler.busy:
            step = scheduler.step(kept)
            deliveries += step.deliveries
            self._observe(step, time.monotonic() - start)
        self._busy = scheduler.busy
        # In this order: a thread that dies in between leaves jobs answered, not forgotten.
        if deliveries and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_deliver, deliveries)
        self.inbox.done([*over, *(d.job for d in deliveries if d.is_last)])
        return len(kept)

    def _observe(self, step: Step, seconds: float) -> None:
        if step.work:
            self.step_time.observe(step.work, seconds)
            self._metrics.batch_size.observe(step.jobs)
            self._metrics.inference_seconds.observe(seconds)
            self._metrics.tokens.inc(step.tokens)

    async def _watch(self) -> None:
        seen = time.monotonic()
        while True:
            await asyncio.sleep(_WATCH_S)
            seen, before = time.monotonic(), seen
            if seen - before > self._settings.stall_s:
                # The whole process stood still (paused, or without a processor), this loop too: the
                # thread's silence until now says nothing about it.
                self._beat = max(self._beat, seen)
            if self._health.state is State.FAILED:
                continue
            silence = time.monotonic() - self._beat
            if self.thread is None or not self.thread.is_alive():
                self._replace(f"the inference thread ended ({self._error!r})")
            elif self._is_up:
                self._judge_silence(silence)
            elif silence > _START_S:
                self._replace(f"the inference thread did not start within {_START_S:g} s")

    def _judge_silence(self, silence: float) -> None:
        if silence > self._settings.hang_s:
            self._replace(f"the inference thread was silent for {silence:.1f} s")
        elif silence > self._settings.stall_s:
            self._health.become(State.DEGRADED, "the inference thread is silent")
        elif not self._health.is_ready:
            self._health.become(State.READY)

    def _replace(self, reason: str) -> None:
        now = time.monotonic()
        self._restarts.append(now)
        while now - self._restarts[0] > self._settings.restart_window_s:
            self._restarts.popleft()
        if len(self._restarts) > self._settings.max_restarts:
            self._give_up(reason)
            return
        _log.warning("Replacing the inference thread: %s", reason)
        self._health.become(State.DEGRADED, reason)
        self._metrics.restarts.inc()
        self._on_restart(reason)
        self._start_thread()

    def _give_up(self, reason: str) -> None:
        _log.error("The server has failed: %s", reason)
        self._health.become(
            State.FAILED, f"{reason}, after {self._settings.max_restarts} replacements"
        )
        _, lost = self.inbox.successor()
        problem = Problem(NOT_READY, f"The server has failed: {reason}.", reason="failed")
        self._refuse([*lost, *self.inbox.empty()], problem)

    def _refuse(self, jobs: Sequence[Job], problem: Problem) -> None:
        for job in jobs:
            job.is_over = True
            if not job.future.done():
                job.future.set_exception(problem)


def _deliver(deliveries: Sequence[Delivery]) -> None:
    for delivery in deliveries:
        job = delivery.job
        if job.future.done():
            continue
        if job.on_token is not None:
            for token in delivery.tokens:
                job.on_token(token)
        if delivery.problem is not None:
            job.future.set_exception(delivery.problem)
        elif delivery.is_last:
            job.future.set_result(delivery.result)


def _deadline_problem() -> Problem:
    return Problem(
        DEADLINE, "The deadline passed before the answer was there; allow more time or send less."
    )
