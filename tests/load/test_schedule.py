"""Arrival times: Poisson, at the phases' rates, fixed by the seed, split without loss."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from forge_harness.load.schedule import (
    Phase,
    arrivals,
    choices,
    phase_of,
    phase_starts,
    share,
    thinned,
)

rates = st.floats(0.5, 200)
phases = st.lists(
    st.builds(
        lambda rate, seconds: Phase(name="p", multiple=1, rate=rate, seconds=seconds),
        rates,
        st.floats(0.1, 3),
    ),
    min_size=1,
    max_size=4,
)


def phase(rate, seconds):
    return Phase(name=f"{rate}", multiple=rate, rate=rate, seconds=seconds)


@settings(max_examples=50)
@given(phases, st.integers(0, 2**32))
def test_times_ascend_within_the_phases_and_repeat_with_the_seed(parts, seed):
    due = arrivals(parts, seed)
    assert due == sorted(due)
    assert all(0 <= t < phase_starts(parts)[-1] for t in due)
    assert arrivals(parts, seed) == due
    assert len(set(due)) == len(due)


def test_counts_and_gaps_are_those_of_a_poisson_process():
    parts = [phase(40.0, 100), phase(200.0, 100), phase(40.0, 100)]
    due = arrivals(parts, 3)
    for index, part in enumerate(parts):
        own = [t for t in due if phase_of(t, parts) == index]
        mean = part.rate * part.seconds
        # Six standard deviations of a Poisson count.
        assert abs(len(own) - mean) < 6 * math.sqrt(mean)
        gaps = [b - a for a, b in pairwise(own)]
        # The seed is fixed, so this is no matter of luck: it holds or it does not.
        assert stats.kstest(gaps, "expon", args=(0, 1 / part.rate)).pvalue > 0.001


def test_a_rate_that_changes_all_the_time_is_followed():
    due = thinned(lambda t: 100 * t, bound=1000, seconds=10, rng=random.Random(5))
    early = sum(t < 5 for t in due)
    # A quarter of a linear ramp's events falls into its first half.
    assert abs(early / len(due) - 0.25) < 0.03
    assert abs(len(due) - 5000) < 6 * math.sqrt(5000)


def test_no_rate_gives_no_arrivals():
    assert thinned(lambda t: 0, bound=0, seconds=10, rng=random.Random(1)) == []


@given(st.integers(0, 500), st.integers(1, 9))
def test_workers_split_every_arrival_once(count, of):
    parts = [list(share(count, worker=i, of=of)) for i in range(of)]
    assert sorted(index for part in parts for index in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(phases, st.floats(0, 20))
def test_a_time_falls_in_the_phase_whose_bounds_hold_it(parts, t):
    starts = phase_starts(parts)
    index = phase_of(t, parts)
    assert starts[index] <= t or index == 0
    assert t < starts[index + 1] or index == len(parts) - 1


def test_requests_are_chosen_by_the_seed_and_all_of_them():
    chosen = choices(1000, 7, 1)
    assert chosen == choices(1000, 7, 1) != choices(1000, 7, 2)
    assert set(chosen) == set(range(7))


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_schedule_is_the_same_wherever_there_is_a_mersenne_twister(seed):
    # numpy's own twister, seeded as Python seeds its: stored plans must mean the same for ever.
    draws = np.random.RandomState([seed]).random_sample(200)
    due = np.cumsum(-np.log1p(-draws[::2]) / 10)
    mine = arrivals([phase(10.0, 5)], seed)
    assert mine == pytest.approx(due[due < 5])
