"""Codes and scales of a weight, as references compute with them."""

from types import SimpleNamespace

import pytest
import torch

from forge_harness.errors import SubjectError
from forge_harness.probes.scales import quantized_weight


def _quantizer(scale):
    return SimpleNamespace(quantize_weight=lambda weight: (weight.sign().to(torch.int8), scale))


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.ones(1, 1)])
def test_one_scale_is_one_in_any_shape(scale):
    assert quantized_weight(_quantizer(scale), torch.ones(3, 4))[1].shape == (1,)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_one_a_row_is_so_in_any_shape(shape):
    assert quantized_weight(_quantizer(torch.ones(shape)), torch.ones(3, 4))[1].shape == (3,)


@pytest.mark.parametrize("shape", [(0,), (2,), (3, 2), (3, 4)])
def test_others_are_refused_with_what_was_expected(shape):
    with pytest.raises(SubjectError, match="expected one, or one a row"):
        quantized_weight(_quantizer(torch.ones(shape)), torch.ones(3, 4))
