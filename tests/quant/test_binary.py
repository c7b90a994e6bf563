"""BitNet v1 binary weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forge_harness.quant import EPS, binary_weight


def test_codes_are_the_sign_around_the_mean_and_the_scale_is_uncentred():
    w = torch.randn(33, 17, generator=torch.Generator().manual_seed(0)) + 0.4
    codes, scale = binary_weight(w)
    values = w.numpy().astype(np.float64)
    expected = np.where(values > values.mean(), 1, -1)
    assert codes.dtype == torch.int8
    assert np.array_equal(codes.numpy(), expected)
    assert float(scale) == pytest.approx(np.abs(values).mean(), rel=1e-6)


def test_the_sign_of_zero_is_minus_one():
    codes, scale = binary_weight(torch.tensor([[-1.0, 0.0, 1.0]]))
    assert codes.tolist() == [[-1, -1, 1]]
    assert float(scale) == pytest.approx(2 / 3)


def test_zero_weights_have_the_floor_as_scale():
    codes, scale = binary_weight(torch.zeros(2, 2))
    assert (codes == -1).all()
    assert float(scale) == pytest.approx(EPS)


def test_non_finite_weights_show_in_the_scale():
    assert not binary_weight(torch.tensor([[1.0, float("nan")]]))[1].isfinite()
