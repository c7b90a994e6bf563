"""Statistics against published tables, other implementations and simulation."""

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from forge_harness.scoring import statistics as s


@pytest.mark.parametrize(
    ("n", "error", "rank", "exact"),
    [
        (20, 0.0207, 6, 0.0207),
        (20, 0.006, 5, 0.0059),
        (20, 0.0014, 4, 0.0013),
        (30, 0.0082, 9, 0.0081),
        (30, 0.0008, 7, 0.0007),
        (40, 0.0084, 13, 0.0083),
        (40, 0.0004, 10, 0.0003),
    ],
)
def test_order_statistic_ranks(n, error, rank, exact):
    bounds = s.order_statistic_bounds(n, error)
    assert bounds.rank == rank
    assert float(bounds.error) == pytest.approx(exact, abs=5e-5)
    assert float(bounds.error) == pytest.approx(stats.binom.cdf(rank - 1, n, 0.5))


def test_too_few_pairs_have_no_bound():
    assert s.order_statistic_bounds(4, 0.05) is None
    assert s.order_statistic_bounds(5, 0.05).error == Fraction(1, 32)
    assert s.order_statistic_bounds(5, 1 / 32).rank == 1
    with pytest.raises(ValueError, match="take 5"):
        s.paired_median_bounds([1.0] * 4, [1.0] * 4, error=0.05)


def test_median_bounds_of_known_pairs():
    base = [2.0] * 20
    candidate = [2.0 * (1 + i / 100) for i in (7, 3, 19, 0, 12, 1, 2, 4, 5, 6, 8, 9, 10)]
    candidate += [2.0 * (1 + i / 100) for i in (11, 13, 14, 15, 16, 17, 18)]
    interval = s.paired_median_bounds(candidate, base, error=0.006)
    assert interval.low == pytest.approx(1.04)  # the fifth smallest
    assert interval.high == pytest.approx(1.15)
    assert interval.estimate == pytest.approx(math.sqrt(1.09 * 1.10))
    assert interval.confidence == pytest.approx(1 - 2 * stats.binom.cdf(4, 20, 0.5))


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=8, max_size=30))
def test_median_bounds_do_not_depend_on_order(pairs):
    def bounds(rows):
        return s.paired_median_bounds([a for a, _ in rows], [b for _, b in rows], error=0.05)

    result = bounds(pairs)
    assert result == bounds(pairs[::-1]) == bounds(sorted(pairs))
    assert result.low <= result.estimate * (1 + 1e-12)
    assert result.estimate <= result.high * (1 + 1e-12)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (1, 300), (95, 100), (0, 300)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_clopper_pearson(k, n, confidence):
    reference = stats.binomtest(k, n).proportion_ci(confidence, method="exact")
    assert s.clopper_pearson(k, n, confidence) == pytest.approx((reference.low, reference.high))


def test_clopper_pearson_edges():
    assert s.clopper_pearson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="11 of 10"):
        s.clopper_pearson(11, 10)
    with pytest.raises(ValueError, match="95 is not a share"):
        s.clopper_pearson(1, 10, 95)


@pytest.mark.parametrize(
    ("share", "confidence", "count"),
    [(0.9, 0.99, 44), (0.95, 0.99, 90), (0.99, 0.99, 459), (0.999, 0.99, 4603), (0.99, 0.95, 299)],
)
def test_required_samples(share, confidence, count):
    assert s.samples_for_share(share, confidence) == count


@pytest.mark.parametrize("exceptions", [1, 2, 5])
def test_required_samples_with_exceptions(exceptions):
    n = s.samples_for_share(0.99, 0.99, exceptions=exceptions)
    assert stats.binom.cdf(exceptions, n, 0.01) <= 0.01 < stats.binom.cdf(exceptions, n - 1, 0.01)


def test_mean_interval_is_students():
    values = [0.91, 0.94, 0.93, 0.97]
    reference = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    interval = s.mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx(reference)


def test_paired_ratio_interval():
    interval = s.paired_ratio_interval([2.0, 4.0], [1.0, 2.0])
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((2, 2, 2))
    wide = s.paired_ratio_interval([1.0, 4.0], [1.0, 1.0])
    assert wide.estimate == pytest.approx(2)
    assert wide.high == pytest.approx(2 * math.exp(stats.t.ppf(0.975, 1) * math.log(2)))


def test_the_ratio_is_that_of_the_sums():
    top, bottom = [[9, 1], [8, 2]], [[10, 4], [10, 2]]
    assert s.ratio_interval(top, bottom).estimate == pytest.approx(20 / 26)


def test_the_ratio_interval_by_hand():
    # ratio 1, cells (top - bottom) * 4 / 40: seeds +-0.1, blocks 0, so MS_seeds = 2 * 2 * 0.01.
    top, bottom = [[11, 11], [9, 9]], [[10, 10], [10, 10]]
    half = stats.t.ppf(0.975, 1) * math.sqrt(0.04 / 4)
    interval = s.ratio_interval(top, bottom)
    assert interval.high == pytest.approx(math.exp(half))
    assert interval.low == pytest.approx(math.exp(-half))


def test_equal_arms_leave_a_point():
    interval = s.ratio_interval([[5, 7], [6, 6]], [[5, 7], [6, 6]])
    assert (interval.low, interval.high) == (1.0, 1.0)


def test_order_of_seeds_and_blocks_is_irrelevant():
    rng = np.random.default_rng(0)
    top, bottom = rng.integers(50, 100, (2, 3, 8))
    seeds, blocks = [2, 0, 1], rng.permutation(8)
    other = s.ratio_interval(top[seeds][:, blocks], bottom[seeds][:, blocks])
    assert other.low == pytest.approx(s.ratio_interval(top, bottom).low, rel=1e-12)


@pytest.mark.parametrize(
    ("seeds", "seed_sd", "block_sd", "miss_at_most"),
    # The documented rates plus at least three standard errors of 1,000 draws.
    [(5, 0.0, 0.02, 0.075), (5, 0.01, 0.02, 0.08), (3, 0.01, 0.0, 0.115)],
)
def test_the_stated_coverage_holds(seeds, seed_sd, block_sd, miss_at_most):
    rng = np.random.default_rng(7)
    size, truth, misses = 100, 0.98, 0
    for _ in range(1000):
        effect = rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, block_sd, (1, 16))
        full = rng.normal(0.8 * size, 0.02 * size, (seeds, 16))
        ternary = full * truth * np.exp(effect + rng.normal(0, 0.01, (seeds, 16)))
        interval = s.ratio_interval(ternary, full)
        misses += not interval.low <= truth <= interval.high
    assert 0 < misses / 1000 <= miss_at_most


@pytest.mark.parametrize(
    ("top", "bottom"),
    [
        ([[1, 2]], [[1, 2]]),
        ([[1], [2]], [[1], [2]]),
        ([[1, 2], [3, 4]], [[1, 2]]),
        ([[0, 0], [0, 0]], [[1, 2], [3, 4]]),
        ([[1, math.nan], [1, 1]], [[1, 2], [3, 4]]),
        ([[1, -2], [1, 1]], [[1, 2], [3, 4]]),
    ],
)
def test_unusable_counts_are_refused(top, bottom):
    with pytest.raises(ValueError, match=r"expected one|must be finite"):
        s.ratio_interval(top, bottom)


def test_importing_scoring_loads_no_numpy():
    code = (
        "import sys, forge_harness.scoring, forge_harness.scoring.statistics;"
        "assert not {'numpy', 'scipy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
