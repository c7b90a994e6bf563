"""What is inside a wrapper is found by the names of its parameters."""

import pytest
import torch
from torch import nn

from forge_harness.probes.wrapped import inner_model


def net():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        compiled,
        nn.DataParallel,
        lambda model: compiled(nn.DataParallel(model)),
    ],
)
def test_the_model_inside_is_found(wrap):
    model = net()
    assert inner_model(wrap(model), net()) is model


def test_a_model_built_with_its_wrapper_stays_in_it():
    model = nn.DataParallel(net())
    assert inner_model(model, nn.DataParallel(net())) is model


@pytest.mark.parametrize("other", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Identity()])
def test_another_model_is_left_as_it_is(other):
    like = nn.ModuleDict({"a": nn.Linear(2, 2)})
    assert inner_model(other, like) is other
