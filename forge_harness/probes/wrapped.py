"""The model inside what trainers put around one: DDP, `torch.compile(model)`, Fabric."""

from __future__ import annotations

from torch import nn


def inner_model(model: nn.Module, like: nn.Module) -> nn.Module:
    """Returns what `model` wraps, where its parameters have other names than those of `like`.

    A wrapper has one child, which has all parameters, and adds its name to theirs.

    Args:
        model: A model, wrapped any number of times or not at all.
        like: The same model as it is built.

    Returns:
        The module whose parameters have the names of `like`; `model` where there is none.
    """
    wanted = {name for name, _ in like.named_parameters()}
    found = model
    while wanted.isdisjoint(name for name, _ in found.named_parameters()):
        children = list(found.children())
        if len(children) != 1:
            return model
        found = children[0]
    return found
