"""The inference thread: watched, replaced a bounded number of times, and nobody is forgotten."""

import asyncio
import contextlib
import threading
import time

import pytest

from forge_harness.serving.engine import CanaryError, Engine, Step
from forge_harness.serving.health import Health, State
from forge_harness.serving.jobs import Delivery, Job
from forge_harness.serving.metrics import Metrics
from forge_harness.serving.problems import CANCELLED, DEADLINE, INFERENCE_FAILED, NOT_READY, Problem
from forge_harness.serving.settings import Settings

WAIT_S = 10


class Echo:
    """Answers with the work; dies of "die", and blocks on an event."""

    by_cost = True
    busy = 0
    room = 2

    def __init__(self, broken_canaries=()):
        self.broken = broken_canaries
        self.batches = []

    def step(self, jobs):
        self.batches.append([job.work for job in jobs])
        for job in jobs:
            if job.work == "die":
                raise SystemExit
            if isinstance(job.work, threading.Event):
                job.work.wait(WAIT_S)
        return Step([Delivery(job, result=job.work) for job in jobs], len(jobs), len(jobs))

    def canary(self):
        if self.broken:
            raise CanaryError(self.broken.pop())


@contextlib.asynccontextmanager
async def engine(scheduler=None, **limits):
    settings = Settings(**{"stall_s": 0.3, "hang_s": 0.6, "max_restarts": 2, **limits})
    health, metrics = Health(), Metrics()
    built = scheduler or Echo()
    made = Engine(lambda: built, capacity=2, settings=settings, health=health, metrics=metrics)
    await made.start()
    made.health, made.metrics, made.scheduler = health, metrics, built
    try:
        yield made
    finally:
        await made.stop()


async def becomes(made, state):
    async with asyncio.timeout(WAIT_S):
        while made.health.state is not state:
            await asyncio.sleep(0.01)


def job(work, deadline=WAIT_S):
    future = asyncio.get_running_loop().create_future()
    return Job(work, 1, 1, time.monotonic() + deadline, future)


async def kind_of(job):
    with pytest.raises(Problem) as found:
        await job.future
    return found.value.kind


def test_jobs_are_answered_in_order_and_no_batch_is_larger_than_there_is_room():
    async def run():
        async with engine() as made:
            await becomes(made, State.READY)
            jobs = [job(n) for n in range(20)]
            for each in jobs:
                made.submit(each)
            assert [await each.future for each in jobs] == list(range(20))
            assert [n for batch in made.scheduler.batches for n in batch] == list(range(20))
            assert max(map(len, made.scheduler.batches)) <= 2
            async with asyncio.timeout(WAIT_S):
                while made.inbox.taken:
                    await asyncio.sleep(0.01)
            assert made.inbox.waiting_cost == 0

    asyncio.run(run())


def test_it_is_not_ready_before_the_canary_was_answered_and_fails_after_so_many_replacements():
    async def run():
        async with engine(Echo(broken_canaries=["first"])) as made:
            assert made.health.state is State.STARTING
            await becomes(made, State.READY)
            assert made.metrics.restarts._value.get() == 1
        async with engine(Echo(broken_canaries=list("abcdef"))) as made:
            waiting = job("never")
            made.submit(waiting)
            assert await kind_of(waiting) is NOT_READY
            assert made.health.state is State.FAILED
            assert made.metrics.restarts._value.get() == 2

    asyncio.run(run())


def test_a_thread_that_dies_fails_its_own_jobs_and_the_next_one_takes_what_waits():
    async def run():
        async with engine() as made:
            await becomes(made, State.READY)
            gate = threading.Event()
            held, dying, mate, after = job(gate), job("die"), job("mate"), job("after")
            for each in (held, job("filler"), dying, mate, after):
                made.submit(each)
            gate.set()
            assert await held.future is gate
            assert await kind_of(dying) is INFERENCE_FAILED
            assert await kind_of(mate) is INFERENCE_FAILED
            assert await after.future == "after"
            await becomes(made, State.READY)

    asyncio.run(run())


def test_a_silent_thread_degrades_then_is_replaced_and_answers_nobody_when_it_wakes():
    async def run():
        async with engine() as made:
            await becomes(made, State.READY)
            gate = threading.Event()
            hung = job(gate)
            made.submit(hung)
            first = made.thread
            await becomes(made, State.DEGRADED)
            assert made.thread is first
            waiting = job("waiting")
            made.submit(waiting)
            assert await kind_of(hung) is INFERENCE_FAILED
            assert await waiting.future == "waiting"
            gate.set()
            await asyncio.to_thread(first.join, WAIT_S)
            assert not first.is_alive()
            assert made.thread.is_alive()
            await becomes(made, State.READY)

    asyncio.run(run())


def test_a_thread_is_not_replaced_for_a_pause_of_the_whole_process():
    async def run():
        async with engine(stall_s=1.0, hang_s=2.0) as made:
            gate = threading.Event()
            held = job(gate)
            made.submit(held)
            await becomes(made, State.READY)
            while not made.scheduler.batches:
                await asyncio.sleep(0.01)
            threading.Timer(2.6, gate.set).start()
            time.sleep(2.5)  # neither the thread nor the loop that watches it does anything
            assert await held.future is gate

    asyncio.run(run())


def test_what_is_late_when_it_is_taken_is_answered_by_the_thread():
    """The event loop may be too busy for its timers; the thread looks at the clock itself."""

    async def run():
        async with engine() as made:
            await becomes(made, State.READY)
            late = job("late", deadline=-1)
            made.inbox.put(late)
            assert await kind_of(late) is DEADLINE
            assert made.scheduler.batches == []

    asyncio.run(run())


def test_only_an_idle_engine_forgets_what_steps_took_and_not_at_once():
    async def run():
        async with engine() as made:
            made.step_time.observe(1, 5.0)
            now = time.monotonic()
            assert not made.starts_over(now)
            gate = threading.Event()
            held = job(gate)
            made.submit(held)
            assert not made.starts_over(now + 60)
            gate.set()
            await held.future
            async with asyncio.timeout(WAIT_S):
                while not made.starts_over(time.monotonic() + 60):
                    await asyncio.sleep(0.01)
            assert made.wait_s(1, 1) == 0.0

    asyncio.run(run())


def test_what_is_late_or_abandoned_is_never_computed():
    async def run():
        async with engine(stall_s=5, hang_s=9) as made:
            await becomes(made, State.READY)
            gate = threading.Event()
            blocks = [job(gate), job(gate)]
            for each in blocks:
                made.submit(each)
            while not made.scheduler.batches:
                await asyncio.sleep(0.01)
            late, left, kept = job("late", deadline=0.05), job("left"), job("kept")
            for each in (late, left, kept):
                made.submit(each)
            made.abandon(left, Problem(CANCELLED, "left"))
            assert await kind_of(late) is DEADLINE
            assert await kind_of(left) is CANCELLED
            gate.set()
            assert await kept.future == "kept"
            computed = [work for batch in made.scheduler.batches for work in batch]
            assert "late" not in computed
            assert "left" not in computed

    asyncio.run(run())
