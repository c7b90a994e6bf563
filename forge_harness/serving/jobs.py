"""Work on its way to the inference thread, and the queue it waits in."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .problems import Problem


@dataclass(slots=True, eq=False)
class Job:
    """One request's work.

    Attributes:
        work: What the scheduler computes: rows, or a prompt.
        cost: Units of work: rows, or most tokens.
        steps: Fewest steps of the scheduler it takes.
        deadline: On the monotonic clock; nothing is computed for it afterwards.
        future: Of the event loop; gets the result.
        on_token: Called in the event loop with each token of a stream; None: no stream.
        arrived: When it was admitted.
        started: When it left the queue.
        mates: Jobs of the step it was computed in, itself included.
        is_over: Somebody has answered, so it need not be computed.
    """

    work: Any
    cost: int
    steps: int
    deadline: float
    future: asyncio.Future[Any]
    on_token: Callable[[int], None] | None = None
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    mates: int = 0
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the inference thread hands to the event loop: tokens, and at the end a result."""

    job: Job
    tokens: tuple[int, ...] = ()
    result: Any = None
    problem: Problem | None = None
    is_last: bool = True


class StaleError(Exception):
    """The thread was replaced; it must end without touching anything."""


class Inbox:
    """A queue of jobs with one reader at a time: the newest generation of the inference thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._waiting: deque[Job] = deque()
        self._generation = 0
        self.waiting_cost = 0
        self.taken: set[Job] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, job: Job) -> None:
        """Adds a job."""
        with self._changed:
            self._waiting.append(job)
            self.waiting_cost += job.cost
            self._changed.notify()

    def discard(self, job: Job) -> bool:
        """Takes a job out again; returns whether it was still waiting."""
        with self._changed:
            try:
                self._waiting.remove(job)
            except ValueError:
                return False
            self.waiting_cost -= job.cost
            return True

    def take(
        self,
        generation: int,
        *,
        room: int,
        by_cost: bool,
        wait_s: float = 0.0,
        window_s: float = 0.0,
    ) -> list[Job]:
        """Takes what waits, in order.

        Args:
            generation: Of the reader.
            room: Most jobs, or their most cost; one job is taken however large.
            by_cost: Whether `room` is cost.
            wait_s: How long to wait for the first job.
            window_s: How long to wait for more when there is room.

        Raises:
            StaleError: The reader was replaced.
        """
        with self._changed:
            if not self._waiting and wait_s:
                self._changed.wait(wait_s)
            if window_s and self._waiting:
                self._wait_for_more(room, by_cost, time.monotonic() + window_s)
            if generation != self._generation:
                raise StaleError
            jobs = list(self._fitting(room, by_cost))
            self.taken.update(jobs)
            return jobs

    def successor(self) -> tuple[int, list[Job]]:
        """Makes room for a new reader; returns its generation and what the last one had taken."""
        with self._changed:
            self._generation += 1
            lost = list(self.taken)
            self.taken.clear()
            self._changed.notify_all()
            return self._generation, lost

    def done(self, jobs: Iterable[Job]) -> None:
        """Forgets jobs that were answered."""
        with self._changed:
            self.taken.difference_update(jobs)

    def empty(self) -> list[Job]:
        """Takes out everything that waits."""
        with self._changed:
            jobs = list(self._waiting)
            self._waiting.clear()
            self.waiting_cost = 0
            return jobs

    def _wait_for_more(self, room: int, by_cost: bool, until: float) -> None:
        while (self.waiting_cost if by_cost else len(self._waiting)) < room:
            left = until - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return

    def _fitting(self, room: int, by_cost: bool) -> Iterable[Job]:
        used = 0
        while self._waiting:
            size = self._waiting[0].cost if by_cost else 1
            if (used and used + size > room) or (not by_cost and used + size > room):
                return
            used += size
            job = self._waiting.popleft()
            self.waiting_cost -= job.cost
            yield job
