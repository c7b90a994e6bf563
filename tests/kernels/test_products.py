"""The native products: exact sums, and the reference's bits, on every path and thread count."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness import kernels, quant

PATHS = kernels.cpu_paths()
THREADS = (1, 2)


def draw(*shape, seed=0, low=-128, high=128):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=torch.int16, generator=generator).to(torch.int8)


def sums(q, codes):
    """int64 products by numpy, which shares nothing with the kernels."""
    return torch.from_numpy(q.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T)


@pytest.fixture(params=THREADS)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60)
@given(
    m=st.integers(1, 130), n=st.integers(1, 130), k=st.integers(1, 130), seed=st.integers(0, 999)
)
def test_sums_are_exact_for_every_shape(path, m, n, k, seed):
    q, codes = draw(m, k, seed=seed), draw(n, k, seed=seed + 1, low=-1, high=2)
    found = kernels.ternary_matmul(q, kernels.pack(codes, scale=1.0), backend="native", path=path)
    assert torch.equal(found.long(), sums(q, codes))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 2560, 2560),
        (1, 6912, 2560),
        (3, 2560, 6912),
        (16, 640, 4096),
        (73, 300, 1000),
        # More weights than stay in the cache at once, where a path takes them in parts.
        (81, 300, 16384),
    ],
)
def test_sums_are_exact_for_layers_of_models(path, m, n, k, threads):
    q, codes = draw(m, k), draw(n, k, seed=1, low=-1, high=2)
    found = kernels.ternary_matmul(q, kernels.pack(codes, scale=1.0), backend="native", path=path)
    assert torch.equal(found.long(), sums(q, codes))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 33])
@pytest.mark.parametrize("k", [15, 16, 2176, 4096, 16384])
@pytest.mark.parametrize(("x", "w"), [(127, 1), (-128, 1), (-128, -1), (127, -1), (127, 0)])
def test_the_largest_sums_do_not_overflow(path, m, k, x, w):
    # int16 accumulators pass on random codes and fail on these.
    q = torch.full((m, k), x, dtype=torch.int8)
    packed = kernels.pack(torch.full((65, k), w, dtype=torch.int8), scale=1.0)
    found = kernels.ternary_matmul(q, packed, backend="native", path=path)
    assert found.eq(k * x * w).all()


@pytest.mark.parametrize("path", PATHS)
def test_the_longest_rows_are_exact(path):
    k = kernels.MAX_COLUMNS
    packed = kernels.pack(torch.ones(1, k, dtype=torch.int8), scale=1.0)
    for m in (1, 2):
        q = torch.full((m, k), -128, dtype=torch.int8)
        found = kernels.ternary_matmul(q, packed, backend="native", path=path)
        assert found.eq(-128 * k).all()


@pytest.mark.parametrize("path", PATHS)
def test_runs_of_one_sign_are_exact(path):
    k = 8192
    q = torch.cat([torch.full((3, k // 2), 127), torch.full((3, k // 2), -127)], 1).to(torch.int8)
    codes = draw(70, k, low=0, high=2)
    codes[:, k // 2 :] *= -1
    found = kernels.ternary_matmul(q, kernels.pack(codes, scale=1.0), backend="native", path=path)
    assert torch.equal(found.long(), sums(q, codes))


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40)
@given(
    m=st.integers(0, 20),
    n=st.integers(1, 130),
    k=st.integers(1, 130),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    rowwise=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_linear_has_the_reference_s_bits(path, m, n, k, dtype, rowwise, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-6, 4, max(m, 1))[:m, None]
    x = x.to(dtype)
    scale = torch.rand(n, generator=generator) + 0.01 if rowwise else 0.037
    packed = kernels.pack(draw(n, k, seed=seed, low=-1, high=2), scale=scale)
    bias = torch.randn(n, generator=generator) if biased else None
    found = kernels.ternary_linear(x, packed, bias, backend="native", path=path)
    expected = kernels.ternary_linear(x, packed, bias, backend="reference")
    assert found.dtype == x.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 7, 16, 33, 64, 1000])
def test_activations_are_quantized_as_quant_does(path, dtype, k):
    x = torch.randn(300, k, generator=torch.Generator().manual_seed(k))
    x *= torch.logspace(-30, 30, 300)[:, None]
    x[0, 0], x[1, -1], x[2], x[3, 0] = torch.nan, torch.inf, 0.0, -torch.inf
    x[4] = 3.4e38
    x[5] = -0.0
    x = x.to(dtype)
    q, scale = kernels.quantize_activations(x, backend="native", path=path)
    codes, expected = quant.absmax_int8(x)
    assert torch.equal(q, codes)
    assert torch.equal(scale, expected) or torch.equal(scale.isnan(), expected.isnan())
    assert torch.equal(scale.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("path", PATHS)
def test_ties_round_to_even(path):
    # With absmax 127 the factor is exactly 1, so that halves stay halves.
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    q, scale = kernels.quantize_activations(x, backend="native", path=path)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    assert scale.item() == 1.0


@pytest.mark.parametrize("path", PATHS)
def test_a_token_that_is_not_finite_spoils_its_own_row_only(path):
    x = torch.ones(3, 64)
    x[1, 5] = torch.nan
    packed = kernels.pack(draw(65, 64, low=-1, high=2), scale=1.0)
    y = kernels.ternary_linear(x, packed, backend="native", path=path)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_operands_of_any_stride_and_alignment(path):
    packed = kernels.pack(draw(70, 100, low=-1, high=2), scale=0.5)
    base = torch.randn(3 * 101 + 1)
    for x in (
        base[1:301].reshape(3, 100),  # 4 bytes off
        torch.randn(100, 3).t(),
        torch.randn(3, 200)[:, ::2],
        torch.randn(2, 3, 100)[1],
        torch.randn(100),
    ):
        found = kernels.ternary_linear(x, packed, backend="native", path=path)
        expected = kernels.ternary_linear(x.clone().contiguous(), packed, backend="reference")
        assert torch.equal(found, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 65, 17), (5, 63, 15), (13, 130, 129)])
def test_nothing_is_written_beside_the_output(path, dtype, m, n, k, threads):
    from forge_kernels import _native

    guard, canary = 256, 77.0
    packed = kernels.pack(draw(n, k, low=-1, high=2), scale=0.5)
    x = torch.randn(m, k).to(dtype)
    # Poisoned: what was there must not show.
    memory = torch.full((guard + m * n + guard,), torch.nan, dtype=dtype)
    memory[:guard] = memory[-guard:] = canary
    y = memory[guard : guard + m * n]
    dtype_code = 0 if dtype == torch.float32 else 1
    before = packed.data.clone(), x.clone()
    _native.linear(
        path,
        x.data_ptr(),
        dtype_code,
        m,
        k,
        packed.data.data_ptr(),
        n,
        packed.scale.data_ptr(),
        False,
        0,
        y.data_ptr(),
        dtype_code,
        threads,
    )
    assert memory[:guard].eq(canary).all()
    assert memory[-guard:].eq(canary).all()
    assert torch.equal(y.reshape(m, n), kernels.ternary_linear(x, packed, backend="reference"))
    assert torch.equal(packed.data, before[0])
    assert torch.equal(x, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_output_that_was_given_is_filled(backend, dtype):
    packed = kernels.pack(draw(70, 100, low=-1, high=2), scale=0.5)
    x = torch.randn(2, 3, 100).to(dtype)
    out = torch.full((2, 3, 70), torch.nan, dtype=dtype)
    assert kernels.ternary_linear(x, packed, backend=backend, out=out) is out
    assert torch.equal(out, kernels.ternary_linear(x, packed, backend="reference"))
    for wrong in (out[0], out.double(), torch.empty(2, 3, 140, dtype=dtype)[..., ::2]):
        with pytest.raises(ValueError, match="out is"):
            kernels.ternary_linear(x, packed, backend=backend, out=wrong)


def test_threads_do_not_change_a_bit():
    packed = kernels.pack(draw(1000, 2048, low=-1, high=2), scale=0.1)
    x = torch.randn(33, 2048)
    found = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        found.append(kernels.ternary_linear(x, packed, backend="native"))
    torch.set_num_threads(1)
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
# The child only calls the kernels and leaves.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_a_forked_child_has_threads_of_its_own():
    packed = kernels.pack(draw(4096, 2048, low=-1, high=2), scale=0.1)
    x = torch.randn(4, 2048)
    torch.set_num_threads(2)
    expected = kernels.ternary_linear(x, packed, backend="native")
    from forge_kernels import _native

    y = torch.zeros_like(expected)
    child = os.fork()
    if child == 0:  # torch's own OpenMP would hang here; the kernels must not
        _native.linear(
            kernels.cpu_path(),
            x.data_ptr(),
            0,
            4,
            2048,
            packed.data.data_ptr(),
            4096,
            packed.scale.data_ptr(),
            False,
            0,
            y.data_ptr(),
            0,
            2,
        )
        os._exit(0 if y.numpy().tobytes() == expected.numpy().tobytes() else 1)
    _, status = os.waitpid(child, 0)
    torch.set_num_threads(1)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(kernels.ternary_linear(x, packed, backend="native"), expected)


CHILD_OF_TORCH = """
import os, signal, sys, torch
torch.set_num_threads(2)
codes, x = torch.zeros(2048, 2048, dtype=torch.int8), torch.ones(16, 2048)
torch.randn(4096, 4096).exp().sum()  # starts torch's threads, which a child does not have
from forge_harness import kernels
if sys.argv[1] == "loaded":
    kernels.native_version()
if (child := os.fork()) == 0:
    signal.alarm(10)
    packed = kernels.pack(codes, scale=1.0)
    y = kernels.ternary_linear(x, packed, backend="native")
    os._exit(int(y.numpy().any()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("extension", ["loaded", "not loaded"])
def test_the_first_product_may_be_that_of_a_child_whose_parent_used_torch_s_threads(extension):
    command = [sys.executable, "-W", "ignore", "-c", CHILD_OF_TORCH, extension]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.strip() == "0"


def test_many_python_threads_share_the_pool():
    from concurrent.futures import ThreadPoolExecutor

    packed = kernels.pack(draw(2048, 1024, low=-1, high=2), scale=0.1)
    inputs = [torch.randn(m, 1024) for m in (1, 2, 5, 9) * 8]
    expected = [kernels.ternary_linear(x, packed, backend="reference") for x in inputs]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: kernels.ternary_linear(x, packed), inputs))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
