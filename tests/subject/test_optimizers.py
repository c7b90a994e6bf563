"""Optimizers that step as one are what they are apart, before a checkpoint and after it."""

import copy

import pytest
import torch
from torch import nn

from forge_harness.subject.optimizers import Together


def parts(model):
    first, second = model[0], model[1]
    return (
        torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9, nesterov=True),
        torch.optim.AdamW([{"params": [second.weight]}, {"params": [second.bias], "lr": 1e-3}]),
    )


def descend(model, optimizers, steps=3):
    for _ in range(steps):
        for each in optimizers:
            each.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        for each in optimizers:
            each.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))


def test_they_step_as_they_do_apart(model):
    other = copy.deepcopy(model)
    found, expected = descend(model, [Together(*parts(model))]), descend(other, parts(other))
    assert all(map(torch.equal, found, expected))


def test_a_rate_of_theirs_is_the_one_of_all(model):
    one, two = parts(model)
    together = Together(one, two)
    torch.optim.lr_scheduler.LambdaLR(together, lambda _: 0.5)
    assert [group["lr"] for group in (*one.param_groups, *two.param_groups)] == [0.05, 5e-4, 5e-4]


def test_what_is_saved_goes_on_as_it_would_have(model):
    together = Together(*parts(model))
    descend(model, [together])
    saved = copy.deepcopy((model.state_dict(), together.state_dict()))
    expected = descend(model, [together])

    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    other.load_state_dict(saved[0])
    resumed = Together(*parts(other))
    resumed.load_state_dict(saved[1])
    assert len(saved[1]["state"]) == 4
    assert all(map(torch.equal, descend(other, [resumed]), expected))
    resumed.param_groups[0]["lr"] = 0.0
    assert resumed.optimizers[0].param_groups[0]["lr"] == 0.0


def test_a_closure_is_called_once(model):
    together, calls = Together(*parts(model)), []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return float(loss.detach())

    with torch.no_grad():
        loss = together.step(closure)
    assert calls == [True]
    assert loss > 0
    assert len(together.state) == 4


def test_a_parameter_of_two_is_refused(model):
    one, _ = parts(model)
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        Together(one, torch.optim.AdamW(model.parameters()))
