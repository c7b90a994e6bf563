"""Weight decay as one step of an optimizer applies it, all gradients being zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from forge_harness import oracles

from .support import Update, Watch, optimizer_of, trained_model

LIMIT = 2 * oracles.ONE_ULP
"""Two roundings of the weight."""


def decaying_update(session: Any, plan: Sequence[oracles.Rates]) -> Update:
    """Makes steps of zero gradients up to the first that can decay anything; returns its update.

    A warmup from zero has a rate of 0 in its first step, which moves nothing whatever it decays.
    """
    rates = [now.learning_rate for now in plan]
    both = [now.learning_rate * now.weight_decay for now in plan]
    first = next((i for values in (both, rates) for i, value in enumerate(values) if value), 0)
    with Watch(session, zero_gradients=True) as watch:
        for _ in range(first + 1):
            watch.step()
    return watch.updates[-1]


def decay_error(session: Any, update: Update, name: str, decays: Sequence[float]) -> float:
    """Returns the largest |move + rate * decay * w| over the largest |w|.

    Args:
        session: Of the update.
        update: Of zero gradients.
        name: A parameter that is not all zero.
        decays: As planned, of the steps up to this one.
    """
    weight = update.before[name].double()
    decay = _applied(session, name, decays)
    wanted = -update.learning_rate[name] * decay * weight
    return float((update.moved(name) - wanted).abs().max() / weight.abs().max())


def own_multiple(session: Any, update: Update, name: str) -> float | None:
    """Returns c of a move of -rate * c * w by an optimizer that is none of torch's; or None.

    LAMB and LARS bring each update to the norm of its weight: of zero gradients is left -rate * w,
    whatever the decay.
    """
    if type(optimizer_of(session)).__module__.startswith("torch.optim"):
        return None
    weight, moved = update.before[name].double(), update.moved(name)
    multiple = -float((moved * weight).sum() / weight.square().sum())
    off = float((moved + multiple * weight).abs().max() / weight.abs().max())
    return multiple / update.learning_rate[name] if off <= LIMIT and multiple > 0 else None


def _applied(session: Any, name: str, decays: Sequence[float]) -> float:
    """The decay of the last step; torch's SGD has it go through its momentum."""
    if type(optimizer_of(session)) is not torch.optim.SGD:
        return decays[-1]
    parameter = trained_model(session).get_parameter(name)
    groups = optimizer_of(session).param_groups
    group = next(g for g in groups if any(p is parameter for p in g["params"]))
    momentum, buffer = group["momentum"], decays[0]
    for decay in decays[1:]:
        buffer = momentum * buffer + (1 - group["dampening"]) * decay
    if not momentum:
        return decays[-1]
    return decays[-1] + momentum * buffer if group["nesterov"] else buffer
