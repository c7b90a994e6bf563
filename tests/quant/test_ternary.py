"""absmean ternary and absmax int8 against float64 oracles and the relations they must obey."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forge_harness.quant import (
    EPS,
    absmax_int8,
    absmean_ternary,
    absmean_ternary_parts,
    dequantize,
)
from forge_harness.quant.bounds import (
    ACTIVATION_ERROR_CODES,
    GAUSSIAN_DENSITY,
    WEIGHT_SCALE_RTOL,
)

RELAXED = settings(max_examples=60)
# The oracle's code and ours may differ where w / scale is this close to a tie.
TIE_MARGIN = 1e-5


@st.composite
def matrices(draw, max_side=130, exponents=(-6, 6)):
    """Gaussian (N, K) with a magnitude of 10**e; seeds shrink, values need not."""
    shape = draw(st.tuples(st.integers(1, max_side), st.integers(1, max_side)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(*exponents))


def oracle_codes(values: np.ndarray, scale: float, low: int, high: int) -> np.ndarray:
    return np.clip(np.rint(values / scale), low, high)


def away_from_ties(ratio: np.ndarray, margin: float) -> np.ndarray:
    return np.abs(ratio - np.floor(ratio) - 0.5) > margin


@RELAXED
@given(matrices())
def test_weight_scale_is_the_absolute_mean_of_float64(w):
    codes, scale = absmean_ternary(w)
    expected = max(np.abs(w.numpy().astype(np.float64)).mean(), EPS)
    assert scale.dtype == torch.float32
    assert scale.shape == ()
    assert abs(float(scale) - expected) <= WEIGHT_SCALE_RTOL * expected
    ratio = w.numpy().astype(np.float64) / expected
    clear = away_from_ties(ratio, TIE_MARGIN)
    assert codes.dtype == torch.int8
    assert (codes.numpy() == oracle_codes(ratio, 1.0, -1, 1))[clear].all()


@RELAXED
@given(matrices())
@example(torch.tensor([[1.9185443, 1.9261272]]))  # 2.4u beyond half a step
def test_activation_codes_match_float64(x):
    codes, scale = absmax_int8(x)
    values = x.numpy().astype(np.float64)
    expected = np.maximum(np.abs(values).max(-1, keepdims=True), EPS) / 127
    assert scale.shape == (x.shape[0], 1)
    np.testing.assert_allclose(scale.numpy(), expected, rtol=2**-23)
    ratio = values / expected
    clear = away_from_ties(ratio, 1e-4)
    assert (codes.numpy() == oracle_codes(ratio, 1.0, -128, 127))[clear].all()
    assert np.abs(ratio - codes.numpy()).max() <= ACTIVATION_ERROR_CODES


@RELAXED
@given(matrices(exponents=(-4, 6)))
def test_every_token_above_the_floor_uses_the_full_range(x):
    above = x.abs().amax(-1) >= EPS
    codes, _ = absmax_int8(x)
    assert (codes.abs().amax(-1)[above] == 127).all()
    assert codes.min() >= -127


def test_ties_round_half_to_even():
    codes, scale = absmean_ternary(torch.tensor([[0.5, -0.5, 1.5, 1.5]]))
    assert float(scale) == 1.0
    assert codes.tolist() == [[0, 0, 1, 1]]
    codes, scale = absmax_int8(torch.tensor([127.0, 0.5, 1.5, -0.5, 2.5, -1.5]))
    assert scale.tolist() == [1.0]
    assert codes.tolist() == [127, 0, 2, 0, 2, -2]


def test_no_code_reaches_minus_128():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 33, generator=generator) * torch.logspace(-6, 6, 4096)[:, None]
    assert absmax_int8(-x.abs())[0].min() == -127


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_quantized_in_fp32(dtype):
    w = torch.randn(40, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    for quantize in (absmean_ternary, absmax_int8):
        codes, scale = quantize(w)
        expected_codes, expected_scale = quantize(w.float())
        assert scale.dtype == torch.float32
        assert torch.equal(codes, expected_codes)
        assert torch.equal(scale, expected_scale)


@RELAXED
@given(matrices(max_side=40, exponents=(0, 3)), st.integers(-8, 8))
def test_powers_of_two_scale_exactly(w, exponent):
    for quantize in (absmean_ternary, absmax_int8):
        codes, scale = quantize(w)
        scaled_codes, scaled = quantize(w * 2.0**exponent)
        above = torch.minimum(scale, scaled) > EPS
        assert torch.equal(scaled_codes.where(above, codes), codes)
        assert torch.equal(scaled.where(above, scale), (scale * 2.0**exponent).where(above, scale))


@RELAXED
@given(matrices(max_side=40, exponents=(0, 0)), st.floats(1e-3, 1e3))
def test_other_factors_scale_to_one_step(w, factor):
    for quantize in (absmean_ternary, absmax_int8):
        codes, scale = quantize(w)
        scaled_codes, scaled = quantize(w * factor)
        floored = torch.minimum(scale, scaled) <= (EPS if scale.dim() == 0 else EPS / 127)
        torch.testing.assert_close(
            scaled.where(~floored, 1), (scale * factor).where(~floored, 1), rtol=5e-7, atol=0
        )
        moved = (scaled_codes != codes) & ~floored
        ratio = (w.double() / scale).numpy()[moved.numpy()]
        assert not away_from_ties(ratio, 1e-4).any()


def test_the_floor_is_on_the_absmax_not_on_the_scale():
    # A floor on absmax / 127 would lift every token below 1.27e-3 (a defect seen in the wild).
    x = torch.full((1, 8), 1e-4)
    codes, scale = absmax_int8(x)
    assert (codes == 127).all()
    torch.testing.assert_close(dequantize(codes, scale), x)


@RELAXED
@given(matrices(max_side=40))
def test_negation_negates_codes_only(w):
    for quantize in (absmean_ternary, absmax_int8):
        codes, scale = quantize(w)
        negated, same = quantize(-w)
        assert torch.equal(negated, -codes)
        assert torch.equal(same, scale)


@RELAXED
@given(matrices(max_side=40), st.integers(0, 1000))
def test_permutations_permute_codes(w, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randperm(w.shape[1], generator=generator)
    codes, scale = absmax_int8(w)
    permuted, same = absmax_int8(w[:, columns])
    assert torch.equal(permuted, codes[:, columns])
    assert torch.equal(same, scale)
    weight_codes, weight_scale = absmean_ternary(w)
    permuted, moved = absmean_ternary(w[:, columns])
    torch.testing.assert_close(moved, weight_scale, rtol=1e-6, atol=0)
    ratio = (w[:, columns].double() / weight_scale).numpy()
    clear = torch.from_numpy(away_from_ties(ratio, TIE_MARGIN))
    assert (permuted == weight_codes[:, columns])[clear].all()


@RELAXED
@given(matrices(max_side=40))
def test_a_token_does_not_depend_on_its_batch_mates(x):
    codes, scale = absmax_int8(x)
    alone, own = absmax_int8(x[:1])
    assert torch.equal(alone, codes[:1])
    assert torch.equal(own, scale[:1])


@RELAXED
@given(matrices(max_side=40, exponents=(-3, 3)))
def test_activation_quantization_is_idempotent(x):
    codes, scale = absmax_int8(x)
    again, scale_again = absmax_int8(dequantize(codes, scale))
    floored = scale <= EPS / 127
    assert torch.equal(again.where(floored, codes), codes)
    torch.testing.assert_close(scale_again, scale, rtol=3e-7, atol=0)


def test_requantizing_a_ternary_weight_shrinks_the_scale_by_its_density():
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    codes, scale = absmean_ternary(w)
    density = codes.abs().float().mean()
    assert abs(float(density) - GAUSSIAN_DENSITY) < 0.01
    again, scale_again = absmean_ternary(dequantize(codes, scale))
    assert torch.equal(again, codes)
    torch.testing.assert_close(scale_again, density * scale, rtol=1e-6, atol=0)


def test_zero_and_tiny_groups_stay_finite():
    for value in (0.0, 1e-30, 1e-38, 4.9e-6):
        codes, scale = absmean_ternary(torch.full((3, 5), value))
        assert not codes.any()
        assert float(scale) == pytest.approx(EPS)
        codes, scale = absmax_int8(torch.full((3, 5), value))
        assert torch.isfinite(scale).all()
        assert scale.flatten().tolist() == pytest.approx([EPS / 127] * 3)
    codes, _ = absmean_ternary(torch.full((3, 5), 5.1e-6))
    assert (codes == 1).all()
    assert absmax_int8(torch.full((2, 5), 1e6))[0].eq(127).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_poison_their_group_and_no_other(bad):
    x = torch.ones(2, 4)
    x[0, 1] = bad
    codes, scale = absmax_int8(x)
    assert dequantize(codes, scale)[0].isnan().all()
    assert dequantize(codes, scale)[1].eq(1).all()
    codes, scale = absmean_ternary(x)
    assert dequantize(codes, scale).isnan().all()


def test_the_input_is_neither_changed_nor_attached():
    w = torch.randn(6, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
    before = w.detach().clone()
    for quantize in (absmean_ternary, absmax_int8):
        _, scale = quantize(w)
        assert not scale.requires_grad
        assert torch.equal(w.detach(), before)


def test_thread_count_does_not_move_the_scale():
    # A full reduction is split by thread count; over several weights some last bit then moves.
    generator = torch.Generator().manual_seed(4)
    weights = [torch.randn(512, 700, generator=generator) for _ in range(12)]
    threads = torch.get_num_threads()
    scales = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            scales.append([float(absmean_ternary(w)[1]) for w in weights])
    finally:
        torch.set_num_threads(threads)
    assert scales[0] == scales[1] == scales[2]


def test_how_a_weight_lies_in_memory_does_not_move_the_scale():
    for seed in range(20):
        w = torch.randn(65, 200, generator=torch.Generator().manual_seed(seed))
        by_columns = w.t().contiguous().t()
        every_other = torch.stack([w, -w], dim=2)[:, :, 0]
        for strided in (by_columns, every_other):
            for same, expected in zip(absmean_ternary(strided), absmean_ternary(w), strict=True):
                assert torch.equal(same, expected)


def test_parts_keep_one_scale_each():
    generator = torch.Generator().manual_seed(5)
    small, large = torch.randn(6, 64, generator=generator) * 0.02, torch.randn(10, 64) * 0.5
    codes, scales = absmean_ternary_parts(torch.cat([small, large]), (6, 10))
    expected = [absmean_ternary(part) for part in (small, large)]
    assert torch.equal(codes, torch.cat([part_codes for part_codes, _ in expected]))
    assert torch.equal(scales, torch.stack([scale for _, scale in expected]))
    assert scales.dtype == torch.float32


@pytest.mark.parametrize("parts", [(), (4,), (3, 4), (0, 5), (6, -1)])
def test_parts_must_cover_the_rows(parts):
    with pytest.raises(ValueError, match="5 rows"):
        absmean_ternary_parts(torch.ones(5, 2), parts)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"shape \(3,\).*2-D"):
        absmean_ternary(torch.ones(3))
    with pytest.raises(TypeError, match=r"int8.*floating"):
        absmean_ternary(torch.ones(3, 3, dtype=torch.int8))
    with pytest.raises(TypeError, match=r"int64.*floating"):
        absmax_int8(torch.ones(3, dtype=torch.int64))
    for empty in (torch.tensor(1.0), torch.ones(3, 0)):
        with pytest.raises(ValueError, match="K >= 1"):
            absmax_int8(empty)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_weight_has_the_floor_as_scale(shape):
    codes, scale = absmean_ternary(torch.empty(shape))
    assert codes.shape == shape
    assert float(scale) == pytest.approx(EPS)
