"""Micro-batches: what a request gets does not depend on whom it was computed with."""

import asyncio
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness.formats.detect import open_checkpoint
from forge_harness.model.from_checkpoint import model_from_checkpoint
from forge_harness.serving.batcher import BatchScheduler
from forge_harness.serving.engine import CanaryError
from forge_harness.serving.jobs import Job
from forge_harness.serving.package import load_served
from forge_harness.serving.problems import INTERNAL, UNPROCESSABLE

from .support import DIGITS


@pytest.fixture(scope="module")
def served():
    return load_served(DIGITS)


@pytest.fixture(scope="module")
def trained():
    with open_checkpoint(DIGITS) as checkpoint:
        return model_from_checkpoint(checkpoint)


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def job(loop, rows):
    return Job(rows, len(rows), 1, time.monotonic() + 60, loop.create_future())


def logits(deliveries):
    return [delivery.result.logits.tobytes() for delivery in deliveries]


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-30, 1.0, 1e4, 1e30]),
)
def test_a_row_has_the_bits_it_has_alone_and_those_of_the_trained_model(
    served, trained, sizes, seed, scale
):
    loop = asyncio.new_event_loop()
    draw = np.random.default_rng(seed)
    rows = [
        (draw.standard_normal((size, 64)) * scale * draw.choice([0, 1e-3, 1])).astype(np.float32)
        for size in sizes
    ]
    scheduler = BatchScheduler(served, max_batch=256)
    together = logits(scheduler.step([job(loop, each) for each in rows]).deliveries)
    for each, got in zip(rows, together, strict=True):
        alone = b"".join(
            logits(scheduler.step([job(loop, row[None])]).deliveries)[0] for row in each
        )
        assert got == alone
        with torch.inference_mode():
            assert got == trained(torch.from_numpy(each)).numpy().tobytes()
    loop.close()


def test_a_row_without_finite_logits_fails_alone(served, loop):
    good = np.full((1, 64), 0.5, np.float32)
    bad = np.full((1, 64), np.finfo(np.float32).max, np.float32)
    scheduler = BatchScheduler(served, max_batch=8)
    first, wrong, last = scheduler.step([job(loop, x) for x in (good, bad, good)]).deliveries
    assert wrong.problem.kind is UNPROCESSABLE
    assert first.result.logits.tobytes() == last.result.logits.tobytes()


def test_an_input_the_model_raises_on_ends_its_own_job_only(served, loop):
    jobs = [job(loop, np.zeros((1, n), np.float32)) for n in (64, 64, 63)]
    step = BatchScheduler(served, max_batch=8).step(jobs)
    by_job = {delivery.job: delivery for delivery in step.deliveries}
    assert by_job[jobs[2]].problem.kind is INTERNAL
    assert [by_job[j].problem for j in jobs[:2]] == [None, None]


def test_the_canary_sees_one_changed_bit(served):
    scheduler = BatchScheduler(served, max_batch=8)
    scheduler.canary()
    layer = next(m for m in served.model.modules() if hasattr(m, "packed")).packed
    with torch.inference_mode():
        before = layer.scale.clone()
        layer.scale.mul_(1.0000002)
        with pytest.raises(CanaryError):
            scheduler.canary()
        layer.scale.copy_(before)
    scheduler.canary()
