"""The subject's ternary kernels: exact on whatever comes, and near what the machine can do."""

import itertools

import numpy as np
import pytest
import torch

from forge_harness import kernels
from forge_harness.benchmarks.products import MOST_SHARE
from forge_harness.benchmarks.timing import in_one_thread, interleave
from forge_harness.kernels.backends import TILE_PATHS, native

SHAPES = (
    (1, 1, 1),
    (1, 65, 17),
    (2, 64, 16),
    (3, 63, 130),
    (5, 130, 129),
    (17, 100, 250),
    (130, 66, 48),
    (3, 300, 512),
)
"""(M, N, K) around the sizes of blocks, registers and prompts; the last has codes beyond 2**16."""
LONG = ((1, 4096), (2, 16384), (3, 4096), (6, 4096), (17, 4096), (33, 4096))
"""(M, K) of the largest sums: int16 accumulators hold 258 products of 127. Kernels have other code
for several tokens than for one, and tiles from four or sixteen on."""
LARGEST = ((127, 1), (127, -1), (-127, 1), (-128, 1), (-128, -1))
"""(activation, code) of the largest sums."""


@pytest.mark.forge_check("performance.kernel_against_reference")
def test_kernel_against_reference(subject, evidence):
    """Every kernel of the subject returns exact integer sums.

    Oracle: int64 products by numpy. Random codes do not find an accumulator that is too narrow, as
    their sums stay near zero; all +1 times all 127 does, at every length up to 16384.
    """
    generator = torch.Generator().manual_seed(7)
    wrong, refusals = 0, {}
    names = _products(subject)
    for name in names:
        for m, n, k in SHAPES:
            q = torch.randint(-128, 128, (m, k), generator=generator).to(torch.int8)
            codes = torch.randint(-1, 2, (n, k), generator=generator).to(torch.int8)
            wrong += _differing(subject, name, q, codes, refusals)
        for (m, k), (value, code) in itertools.product(LONG, LARGEST):
            q = torch.full((m, k), value, dtype=torch.int8)
            codes = torch.full((65, k), code, dtype=torch.int8)
            wrong += _differing(subject, name, q, codes, refusals)
    evidence.record("kernels", ", ".join(names), reason="what the subject offers on this machine")
    refused = "; ".join(f"{name}: {error}" for name, error in refusals.items())
    evidence.record(
        "refuse_operands_by_columns", len(refusals), unit="kernels", reason=refused or "none does"
    )
    evidence.equal(
        "sums_that_differ",
        wrong,
        expected=0,
        reason=f"{len(names)} kernels, {len(SHAPES)} shapes and the largest sums, against int64",
    )


MOST_SERIES = 8
"""Of 15 rounds; a kernel under its share takes all of them, about a second and a half."""


@pytest.mark.forge_timing
@pytest.mark.forge_check("performance.kernel_roofline")
def test_kernel_roofline(subject, policy, evidence):
    """The kernel that inference uses reaches its share of the machine's multiply-add rate.

    Sixteen tokens by a 2560 x 2560 weight, one thread (processor time of all, where a kernel starts
    its own): bound by arithmetic. Tiles (AMX) multiply so
    fast that reading the weights would bound sixteen: 128 there, and a share of their own, as
    weights must first be made tiles in the cache. The ceiling is the instruction itself on
    registers, in turns with the product. Each counts with its best round:
    what else the machine does only ever slows, so more rounds bring both nearer to what they can
    do, and neither above it. Operands change from call to call, so that no kept answer counts, and
    the sums that were timed must be exact. A share well over 1 says that the ceiling was disturbed
    in all its rounds: not measured. Without the native kernels, or on a processor they have no such
    probe for, there is no ceiling to hold against.
    """
    if problem := kernels.native_problem():
        pytest.skip(f"the ceilings are measured by the native kernels: {problem}")
    path = kernels.cpu_path()
    extension, operations = native(), 20_000
    each = extension.probe_multiply(path, 1, 1)
    if not each:
        pytest.skip(f"no probe for {path!r} on this processor")
    tiles = path in TILE_PATHS
    m = 128 if tiles else 16
    name = _products(subject)[0]
    codes = torch.randint(-1, 2, (2560, 2560), generator=torch.Generator().manual_seed(1))
    multiply = subject.prepare_product(name, codes.to(torch.int8))
    operands = torch.randint(-127, 128, (8, m, 2560)).to(torch.int8).unbind()
    turns = itertools.cycle(operands)
    measure = "roofline_share_tiles" if tiles else "roofline_share"
    limit = policy.threshold(f"performance.{measure}.at_least")
    calls = {
        "product": lambda: multiply(next(turns)),
        "probe": lambda: extension.probe_multiply(path, operations, 1),
    }
    work = {"product": m * 2560 * 2560, "probe": operations * each}
    rate, ceiling, rounds = _best_rates(calls, work, limit)
    evidence.equal(
        "timed_sums_that_differ",
        sum(_wrong(multiply(q), _sums(q, codes)) for q in (operands[0], operands[-1])),
        expected=0,
        reason="of what was timed, against float64",
    )
    evidence.record(
        "product_rate", 2 * rate / 1e9, unit="GOP/s", reason=f"{name}, {m} tokens, one thread"
    )
    evidence.record("ceiling", 2 * ceiling / 1e9, unit="GOP/s", reason=f"{path} on registers")
    if rate / ceiling > MOST_SHARE:
        pytest.skip(f"the product took {rate / ceiling:.2f} of a ceiling: that one was disturbed")
    evidence.at_least(
        "roofline_share",
        rate / ceiling,
        limit=limit,
        reason=f"best of {rounds} rounds that take turns with the ceiling's",
    )


def _best_rates(calls, work, limit):
    """Returns the rates of product and probe in their best rounds, and how many rounds there were.

    Another series follows while the share of the two is under its limit, or cannot be.
    """
    seconds = {"product": [], "probe": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(MOST_SERIES):
            for side, timed in interleave(calls).items():
                seconds[side] += in_one_thread(timed).seconds
            rate, ceiling = (work[side] / min(seconds[side]) for side in ("product", "probe"))
            if limit <= rate / ceiling <= MOST_SHARE:
                break
    finally:
        torch.set_num_threads(threads)
    return rate, ceiling, len(seconds["product"])


def _products(subject):
    names = list(subject.products())
    if not names:
        pytest.skip("the subject names no kernel that runs here (products)")
    return names


def _differing(subject, name, q, codes, refusals):
    """Sums that differ: at once, again after another product, and of operands by columns.

    Operands by columns may be refused, which is not wrong; who does is put into `refusals`.
    """
    expected = q.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T
    product = subject.prepare_product(name, codes)
    wrong = _wrong(product(q), expected)
    other = subject.prepare_product(name, -codes)
    wrong += _wrong(other(q), -expected) + _wrong(product(q), expected)
    try:
        turned = subject.prepare_product(name, codes.t().contiguous().t())
        found = turned(q.t().contiguous().t())
    except Exception as error:  # a subject's kernel refuses with what it likes
        refusals[name] = type(error).__name__
        return wrong
    return wrong + _wrong(found, expected)


def _sums(q, codes):
    """Exact: float64 holds integers up to 2**53, and BLAS is fast."""
    return q.double().numpy() @ codes.double().numpy().T


def _wrong(found, expected):
    """Sums that are not what is expected: all of them where they are no integers at all."""
    dtype = found.dtype
    is_integer = not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)
    if tuple(found.shape) != expected.shape or not is_integer:
        return expected.size
    return int((found.cpu().numpy() != expected).sum())
