"""The optimizer: who decays, and how gradients are measured and clipped."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from forge_harness.protocols import ScheduleStep
from forge_harness.training.ranks import whole
from forge_harness.training.recipe import Recipe

# Guards the division when every gradient is zero; the value torch.nn.utils uses.
_NORM_EPS = 1e-6


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Returns AdamW over all trainable parameters in two groups: decayed first, then the rest.

    Learning rate and weight decay of a step are set by `apply_schedule` before it.
    """
    decayed, kept = decay_groups(model)
    groups = [{"params": decayed, "decays": True}, {"params": kept, "decays": False}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        # torch refuses a whole number beside a fraction.
        betas=(float(recipe.betas[0]), float(recipe.betas[1])),
        weight_decay=0.0,
        # One kernel a parameter group instead of a dozen small ones a parameter.
        fused=True,
    )


def decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Splits the trainable parameters into those weight decay acts on and the others.

    Decayed: matrices, but not those of an embedding, whoever shares them. Norms, biases and
    embeddings are left alone: decay would shrink what nothing else rescales.
    """
    embeddings = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and id(parameter) not in embeddings
            (decayed if decays else kept).append(parameter)
    return decayed, kept


def apply_schedule(optimizer: torch.optim.Optimizer, now: ScheduleStep) -> None:
    """Sets the learning rate of all groups and the weight decay of the decayed one."""
    for group in optimizer.param_groups:
        group["lr"] = now.learning_rate
        group["weight_decay"] = now.weight_decay if group["decays"] else 0.0


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Returns the L2 norm over all gradients, NaN or infinity if one is not finite.

    Summed a row at a time: one reduction over a whole tensor is split by the number of threads,
    and its last bits with it. Ranks hold whole rows of a sharded gradient, and the sums of all of
    them are added as one process does: the norm has the same bits, which that of torch's
    clip_grad_norm_, a norm of the ranks' norms, has not (3.353224516 against 3.353224754).
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(_square_sum(gradient) for gradient in gradients))
    if math.isfinite(norm):
        return norm
    # Finite entries above 1.8e19 overflow when squared in fp32.
    return math.sqrt(sum(_square_sum(gradient.double()) for gradient in gradients))


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scales all gradients in place so that their L2 norm `norm` becomes at most `limit`."""
    factor = limit / (norm + _NORM_EPS)
    if factor < 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def _square_sum(gradient: Tensor) -> float:
    rows = gradient.detach()
    if rows.dim() > 1:
        rows = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    return float(whole(rows).double().square().sum())
