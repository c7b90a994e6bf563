"""The straight-through estimator: quantized values forward, identity backward."""

from __future__ import annotations

import pytest
import torch

from forge_harness.quant import (
    absmax_int8,
    absmean_ternary,
    absmean_ternary_parts,
    dequantize,
    fake_quantize_activation,
    fake_quantize_weight,
    round_ste,
)
from forge_harness.quant.ste import straight_through


def latent(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    w = torch.randn(13, 9, generator=torch.Generator().manual_seed(0)) * 2
    return w.to(dtype).requires_grad_()


def test_rounding_passes_the_gradient_through():
    x = torch.tensor([0.5, 1.5, -2.5, 7.2], requires_grad=True)
    y = round_ste(x)
    assert y.tolist() == [0.0, 2.0, -2.0, 7.0]
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5])
    y.backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_the_output_is_memory_of_its_own():
    # An op that writes in place to the output must not reach what the caller keeps.
    quantized = torch.tensor([1.0, 0.0])
    y = straight_through(torch.zeros(2, requires_grad=True), quantized)
    y.mul_(2)
    assert quantized.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("fake", [fake_quantize_weight, fake_quantize_activation])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_identity_also_where_codes_saturate(fake, dtype):
    w = latent(dtype)
    upstream = torch.randn(13, 9).to(dtype)
    y = fake(w)
    assert y.dtype == dtype
    y.backward(upstream)
    assert torch.equal(w.grad, upstream)


def test_the_values_are_exactly_scale_times_code():
    w = latent()
    codes, scale = absmean_ternary(w)
    assert torch.equal(fake_quantize_weight(w), codes.float() * scale)
    assert fake_quantize_weight(w).unique().numel() == 3
    assert torch.equal(fake_quantize_activation(w), dequantize(*absmax_int8(w)))


def test_an_injected_quantizer_is_used():
    def threes(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones_like(w, dtype=torch.int8), torch.tensor(3.0)

    assert fake_quantize_weight(latent(), threes).eq(3).all()


def test_a_scale_a_row_is_taken_and_any_other_refused():
    def per_row(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = absmean_ternary_parts(w, [1] * w.shape[0])
        return codes, scales

    w = latent()
    expected = torch.cat([fake_quantize_weight(row[None]) for row in w])
    assert torch.equal(fake_quantize_weight(w, per_row), expected)
    with pytest.raises(ValueError, match="13 rows"):
        fake_quantize_weight(w, lambda v: absmean_ternary_parts(v, (6, 7)))
