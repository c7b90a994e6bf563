"""The integer path is exact; its limits and the bounds hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from forge_harness.quant import (
    absmax_int8,
    absmean_ternary,
    absmean_ternary_parts,
    bounds,
    dequantize,
    int8_matmul,
    integer,
    integer_linear,
)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "outputs"), [((1, 1), 1), ((7, 65), 33), ((2, 3, 130), 17), ((0, 8), 4), ((5,), 3)]
)
def test_accumulators_equal_int64(shape, outputs):
    x, w = draw(0, *shape), draw(1, outputs, shape[-1])
    accumulators, factor = integer_linear(x, w)
    q, activation_scale = absmax_int8(x)
    codes, weight_scale = absmean_ternary(w)
    expected = q.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T
    assert accumulators.dtype == torch.int32
    assert np.array_equal(accumulators.numpy(), expected)
    expected_factor = activation_scale * weight_scale
    assert torch.equal(factor, expected_factor)


@pytest.mark.parametrize("product", [integer.int8_matmul, integer.fp32_matmul])
@pytest.mark.parametrize("q_sign", [127, -128])
def test_the_worst_case_sum_is_exact(product, q_sign):
    k = 16_384
    q = torch.full((17, k), q_sign, dtype=torch.int8)
    codes = torch.ones(8, k, dtype=torch.int8)
    codes[1] = -1
    result = product(q, codes).to(torch.int64)
    assert (result[:, 0] == q_sign * k).all()
    assert (result[:, 1] == -q_sign * k).all()


def test_fp32_is_exact_to_its_limit_and_refuses_beyond():
    k = bounds.FP32_EXACT_MAX_K
    q = torch.full((1, k), -128, dtype=torch.int8)
    q[0, 0] = -127
    codes = torch.ones(1, k, dtype=torch.int8)
    assert integer.fp32_matmul(q, codes).item() == -128 * k + 1
    longer = torch.ones(1, k + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match=r'131,073.*compute="int8"'):
        integer.fp32_matmul(longer, longer)


def test_int32_refuses_what_could_overflow():
    longer = torch.ones(1, 1, dtype=torch.int8).expand(1, bounds.INT32_MAX_K + 1)
    with pytest.raises(ValueError, match="16,777,216"):
        int8_matmul(longer, longer)


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("outputs", [1, 2, 8, 15])
def test_small_products_are_exact(rows, k, outputs):
    q = torch.randint(-128, 128, (rows, k), dtype=torch.int8)
    codes = torch.randint(-1, 2, (outputs, k), dtype=torch.int8)
    assert torch.equal(int8_matmul(q, codes).long(), q.long() @ codes.long().t())


def by_columns(*shape: int) -> torch.Tensor:
    """Stored by columns; with one row or column torch calls that contiguous."""
    return torch.randint(-1, 2, shape[::-1], dtype=torch.int8).t()


def sliced(*shape: int) -> torch.Tensor:
    rows, columns = shape
    return torch.randint(-1, 2, (rows, 2 * columns), dtype=torch.int8)[:, :columns]


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("k", [0, 1, 3, 8])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("make", [by_columns, sliced])
def test_products_of_any_strides_are_exact(rows, k, outputs, make):
    q, codes = make(rows, k), make(outputs, k)
    assert torch.equal(int8_matmul(q, codes).long(), q.long() @ codes.long().t())


@pytest.mark.parametrize("product", [integer.int8_matmul, integer.fp32_matmul])
def test_rows_of_different_lengths_are_refused(product):
    q, codes = torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 5, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 5\)"):
        product(q, codes)


@pytest.mark.parametrize(
    ("rows", "k", "outputs"), [(1, 1, 1), (16, 8, 8), (17, 9, 15), (40, 64, 10)]
)
def test_the_sizes_for_cuda_are_those_cublaslt_takes_and_keep_the_sums(rows, k, outputs):
    q = torch.randint(-127, 128, (rows, k), dtype=torch.int8)
    codes = torch.randint(-1, 2, (outputs, k), dtype=torch.int8)
    m, columns, n = integer._cuda_sizes(rows, k, outputs)
    assert m > 16
    assert columns % 8 == n % 8 == 0
    padded = integer._padded(q, m, columns), integer._padded(codes, n, columns)
    result = torch._int_mm(padded[0], padded[1].t())[:rows, :outputs]
    assert torch.equal(result, int8_matmul(q, codes))


@pytest.mark.parametrize("k", [64, 256, 1024, 4096])
def test_fake_quantization_agrees_within_its_bound(k):
    x, w = draw(2, 64, k), draw(3, 48, k) * 0.05
    accumulators, factor = integer_linear(x, w)
    values, weight = dequantize(*absmax_int8(x)), dequantize(*absmean_ternary(w))
    error = (F.linear(values, weight) - accumulators * factor).abs()
    l1 = F.linear(values.abs(), weight.abs())
    assert (error <= bounds.FAKE_QUANT_RTOL_L1 * l1).all()


def test_no_operands_exceed_the_worst_case_bound():
    for k in (1, 16, 106, 512):
        x = draw(k, 20, k)
        accumulators, factor = integer_linear(x, x)
        values, weight = dequantize(*absmax_int8(x)), dequantize(*absmean_ternary(x))
        error = (F.linear(values, weight) - accumulators * factor).abs()
        l1 = F.linear(values.abs(), weight.abs())
        assert (error <= bounds.fake_quant_rtol_worst(k) * l1).all()


def test_quantization_noise_is_the_predicted_one():
    k = 1024
    x, w = draw(4, 64, k), draw(5, 64, k)
    codes, beta = absmean_ternary(w)
    accumulators, factor = integer_linear(x, w)
    exact = x.double() @ (codes.double() * beta.double()).t()
    error = accumulators.double() * factor.double() - exact
    nonzeros = codes.abs().sum(dim=1)
    for row, row_error in zip(x, error, strict=True):
        limit = bounds.activation_error_bound(float(row.abs().max()), float(beta), 1)
        assert (row_error.abs() <= limit * nonzeros).all()
    scales = absmax_int8(x)[1].double()
    density = float(nonzeros.sum()) / codes.numel()
    predicted = bounds.activation_error_rms(1.0, float(beta), k, density)
    assert float((error / scales).square().mean().sqrt()) == pytest.approx(predicted, rel=0.05)


def test_a_scale_a_row_gives_a_factor_an_output():
    x, w = draw(6, 5, 32), draw(7, 6, 32)
    accumulators, factor = integer_linear(
        x, w, quantize_weight=lambda v: absmean_ternary_parts(v, [1] * 6)
    )
    assert factor.shape == (5, 6)
    for row in range(6):
        own, own_factor = integer_linear(x, w[row : row + 1])
        assert torch.equal(accumulators[:, row : row + 1], own)
        assert torch.equal(factor[:, row : row + 1], own_factor)


def test_constants_are_the_derived_numbers():
    assert bounds.INT32_MAX_K == 16_777_215
    assert bounds.FP32_EXACT_MAX_K == 131_072
    assert bounds.INT16_MAX_TERMS == 258
    assert pytest.approx(0.68994, abs=1e-5) == bounds.GAUSSIAN_DENSITY
    np.testing.assert_equal(np.float32(1) + np.float32(bounds.FP32_UNIT_ROUNDOFF), np.float32(1))
