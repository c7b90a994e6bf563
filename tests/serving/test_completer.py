"""Continuous batching: sequences that come and go get the tokens `generate` gives them alone."""

import asyncio
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness.model import generate
from forge_harness.serving.completer import CompletionScheduler
from forge_harness.serving.inputs import Completion
from forge_harness.serving.jobs import Job
from forge_harness.serving.package import load_served
from forge_harness.serving.problems import CANCELLED, DEADLINE, INTERNAL

_PROMPTS = st.lists(st.integers(0, 255), min_size=1, max_size=30)
_WANTED = st.builds(
    Completion,
    prompt=_PROMPTS.map(tuple),
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.7, 3.0]),
    seed=st.integers(0, 2**53),
    stream=st.just(False),
)


@pytest.fixture(scope="module")
def served(byte_lm):
    return load_served(byte_lm)


def job(wanted, deadline=60.0, on_token=None):
    tokens = wanted.max_tokens
    return Job(wanted, tokens, tokens, time.monotonic() + deadline, asyncio.Future(), on_token)


def greedy(prompt=(1, 2, 3), tokens=8):
    return Completion(tuple(prompt), tokens, 0.0, 0, False)


def alone(served, wanted):
    return tuple(
        generate(
            served.model.fork(),
            wanted.prompt,
            max_new_tokens=wanted.max_tokens,
            temperature=wanted.temperature,
            seed=wanted.seed,
        )
    )


@settings(max_examples=20)
@given(
    wanted=st.lists(_WANTED, min_size=1, max_size=9), joins=st.lists(st.integers(0, 3), max_size=20)
)
def test_tokens_are_those_generated_alone_whoever_joins_and_leaves(served, wanted, joins):
    async def run():
        scheduler = CompletionScheduler(served, max_batch=4)
        waiting, results = [job(each) for each in wanted], {}
        pace = iter(joins)
        while waiting or scheduler.busy:
            count = min(scheduler.room, next(pace, 4) or (not scheduler.busy))
            taken, waiting = waiting[:count], waiting[count:]
            for delivery in scheduler.step(taken).deliveries:
                assert delivery.is_last
                results[delivery.job.work] = delivery.result
        for each in wanted:
            assert results[each].tokens == alone(served, each)
            assert results[each].finish_reason == "length"

    asyncio.run(run())


def test_streams_get_every_token_and_the_rest_only_the_end(served):
    async def run():
        scheduler = CompletionScheduler(served, max_batch=4)
        streamed, whole = job(greedy(), on_token=lambda token: None), job(greedy())
        step = scheduler.step([streamed, whole])
        seen = {streamed: [], whole: []}
        while scheduler.busy or step:
            for delivery in step.deliveries:
                seen[delivery.job].append(delivery)
            step = scheduler.step([]) if scheduler.busy else None
        assert [len(d.tokens) for d in seen[streamed]] == [1] * 8
        assert [d.is_last for d in seen[streamed]] == [False] * 7 + [True]
        assert tuple(d.tokens[0] for d in seen[streamed]) == alone(served, greedy())
        assert len(seen[whole]) == 1
        assert streamed.mates == 2

    asyncio.run(run())


def test_the_company_of_the_last_step_counts(served):
    async def run():
        scheduler = CompletionScheduler(served, max_batch=4)
        one, two, late = job(greedy(tokens=1)), job(greedy(tokens=2)), job(greedy(tokens=3))
        scheduler.step([one])
        scheduler.step([two])
        scheduler.step([late])
        assert (one.mates, two.mates) == (1, 2)

    asyncio.run(run())


def test_who_left_or_is_late_makes_room_and_the_others_go_on(served):
    async def run():
        scheduler = CompletionScheduler(served, max_batch=3)
        gone, late, stays = job(greedy()), job(greedy((5,))), job(greedy((9, 9)))
        scheduler.step([gone, late, stays])
        assert scheduler.room == 0
        gone.is_over, late.deadline = True, time.monotonic()
        ended = {d.job: d.problem.kind for d in scheduler.step([]).deliveries}
        assert ended == {gone: CANCELLED, late: DEADLINE}
        assert scheduler.room == 2
        while scheduler.busy:
            (*_, last) = scheduler.step([]).deliveries or [None]
        assert last.job is stays
        assert last.result.tokens == alone(served, stays.work)

    asyncio.run(run())


def test_a_prompt_the_model_raises_on_ends_its_own_job_only(served):
    async def run():
        scheduler = CompletionScheduler(served, max_batch=3)
        good, bad = job(greedy(tokens=2)), job(greedy(prompt=[0] * 97))
        (delivery,) = scheduler.step([good, bad]).deliveries
        assert (delivery.job, delivery.problem.kind) == (bad, INTERNAL)
        (delivery,) = scheduler.step([]).deliveries
        assert delivery.result.tokens == alone(served, good.work)
        assert scheduler.room == 3

    asyncio.run(run())


def test_the_canary_is_answered_with_the_bits_of_loading(served):
    scheduler = CompletionScheduler(served, max_batch=1)
    scheduler.canary()
    with torch.inference_mode():
        assert served.expected.shape == (5, 256)
