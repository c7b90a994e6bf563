"""Parameters of a trained model that an export holds nowhere, though the model needs them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn

from forge_harness.formats.checkpoint import Checkpoint
from forge_harness.protocols import BuildsModel

_SAMPLES = 4


def left_out(
    subject: BuildsModel, model: nn.Module, opened: Checkpoint, effective: Mapping[str, Tensor]
) -> list[str]:
    """Returns the names of parameters that no tensor of an export can hold.

    Not among them is what a sound export leaves out: buffers; a tensor that another one stored is
    tied to; latent weights and whatever else moves codes and scales (learned ones), which hold it;
    and what the loss does not need in evaluation mode (a head for training only), by its gradient.
    Nor is what a tensor under a name of its own may hold, being as large.

    Args:
        subject: Says what the loss is, and what the forward multiplies by.
        model: That was exported.
        opened: The export.
        effective: What `subject` says of the model's quantized modules.
    """
    coded = {f"{module}.weight" for module in effective}
    others = opened.infos.keys() - model.state_dict().keys() - coded
    room = max((prod(opened.infos[name].shape) for name in others), default=0)
    missing = {
        name: parameter
        for name, parameter in _not_stored(model, {*opened.infos, *opened.tied})
        if parameter.numel() > room
    }
    if not missing:
        return []
    latent = {weight.data_ptr() for weight in subject.latent_weights(model).values()}
    plain = {
        name: parameter
        for name, parameter in missing.items()
        if parameter.data_ptr() not in latent and not _moves(subject, model, parameter, effective)
    }
    return _needed(subject, model, plain) if plain else []


def _not_stored(model: nn.Module, stored: Collection[str]) -> Iterator[tuple[str, nn.Parameter]]:
    named = [
        (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.numel() and parameter.is_floating_point()
    ]
    # By memory: what is tied may be a parameter of its own over the same values, or a view of them.
    held = {parameter.data_ptr() for name, parameter in named if name in stored}
    for name, parameter in named:
        if parameter.data_ptr() not in held:
            held.add(parameter.data_ptr())
            yield name, parameter


@torch.no_grad()
def _moves(
    subject: BuildsModel, model: nn.Module, parameter: nn.Parameter, effective: Mapping[str, Tensor]
) -> bool:
    """Whether the forward multiplies by something else once a parameter is another."""
    before = {name: values.clone() for name, values in effective.items()}
    kept = parameter.clone()
    try:
        parameter.mul_(1.5).add_(0.1)
        after = subject.effective_weights(model)
        return any(not torch.equal(before[name], after[name]) for name in before)
    finally:
        parameter.copy_(kept)


def _needed(
    subject: BuildsModel, model: nn.Module, parameters: dict[str, nn.Parameter]
) -> list[str]:
    needed: set[str] = set()
    with _evaluated(model, parameters.values()), torch.random.fork_rng([]):
        for task in subject.tasks():
            try:
                batch = subject.example_batch(task, batch_size=_SAMPLES, seed=0)
                loss = subject.loss(model, batch)
                found = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
            except Exception:
                # The model is that of one task; how it refuses batches of another is its affair.
                continue
            pairs = zip(parameters, found, strict=True)
            needed |= {name for name, gradient in pairs if gradient is not None}
    return [name for name in parameters if name in needed]


@contextmanager
def _evaluated(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Puts a model in evaluation mode, with gradients of what may be frozen, and takes it back."""
    modes = {module: module.training for module in model.modules()}
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in modes.items():
            module.training = mode
