"""Percentiles: the exact ranks, when there are too few samples, and the histogram beside them."""

import math
import random

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from forge_harness.load.percentiles import (
    bound_ranks,
    encoded_histogram,
    histogram,
    milliseconds,
    nearest_rank,
    percentile,
    summary,
)

times = st.lists(st.floats(1e-5, 30), min_size=1, max_size=400)


@pytest.mark.parametrize(("share", "needed"), [(0.9, 44), (0.95, 90), (0.99, 459), (0.999, 4603)])
def test_as_many_samples_are_needed_as_mlperf_needs(share, needed):
    few = percentile([0.1] * (needed - 1), share)
    assert few.value is None
    assert few.text == f"too few for {few.name} ({needed - 1} of {needed})"
    enough = percentile([0.1] * needed, share)
    assert (enough.value, enough.high) == (0.1, 0.1)


@given(times, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_value_is_numpys_inverted_cdf_and_lies_in_its_bounds(values, share):
    found = percentile(sorted(values), share)
    if found.value is None:
        assert len(values) < found.needed
        return
    assert found.value == np.quantile(values, share, method="inverted_cdf")
    assert (found.low or 0) <= found.value <= found.high


@pytest.mark.parametrize("n", [7, 50, 90, 459, 1000, 4603])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.95, 0.99])
def test_bounds_are_the_tightest_that_hold_by_the_binomial(n, share):
    low, high = bound_ranks(n, share, 0.99)
    binomial = stats.binom(n, share)
    if low:
        assert binomial.cdf(low - 1) <= 0.01
    assert binomial.cdf(low) > 0.01 or low == n
    if high:
        assert binomial.sf(high - 1) <= 0.01 + 1e-12
        assert high == 1 or binomial.sf(high - 2) > 0.01 - 1e-12
    else:
        assert binomial.sf(n - 1) > 0.01


def test_bounds_cover_the_true_percentile_as_often_as_they_say():
    rng = random.Random(2)
    true = -math.log(0.05)  # p95 of the unit exponential
    below = above = 0
    runs = 1000
    for _ in range(runs):
        found = percentile(sorted(rng.expovariate(1) for _ in range(200)), 0.95)
        below += found.high < true
        above += found.low > true
    # 1 % each by construction; 23 of 1,000 has a probability under 1e-3 at 1 %.
    assert below <= 23
    assert above <= 23


@given(st.integers(1, 10_000), st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999]))
def test_the_rank_is_the_smallest_that_holds_the_share(n, share):
    rank = nearest_rank(n, share)
    assert rank >= share * n - 1e-6
    assert rank == 1 or rank - 1 < share * n


@settings(max_examples=30)
@given(times)
def test_the_histogram_agrees_to_three_digits_and_survives_its_encoding(values):
    found = histogram(values)
    ordered = sorted(values)
    for share in (0.5, 0.95, 1.0):
        rank = nearest_rank(len(ordered), share)
        exact = ordered[rank - 1]
        # Asked for the rank itself: it rounds ranks to the nearest, so its p95 of 11 is the 10th.
        told = found.get_value_at_percentile(100 * rank / len(ordered)) / 1e6
        assert told == pytest.approx(exact, rel=2e-3, abs=2e-6)
    again = HdrHistogram.decode(encoded_histogram(values).encode())
    assert again.get_total_count() == len(values)


def test_requests_without_an_answer_are_the_slowest():
    found = percentile([0.1] * 90 + [math.inf] * 10, 0.95)
    assert found.value == math.inf
    assert "no answer" in found.text
    assert summary([0.1] * 100)[0].value == 0.1


def test_milliseconds_have_three_digits():
    assert [milliseconds(s) for s in (0.0012345, 0.0456, 1.5, None)] == [
        "1.23 ms",
        "45.6 ms",
        "1500 ms",
        "-",
    ]
