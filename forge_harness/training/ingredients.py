"""What a session is made of: model, loss and data, each of which a subject may replace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.model import BitLinear, ByteLM, ByteLMConfig, DigitsModel
from forge_harness.model.bitlinear import LinearFunction
from forge_harness.protocols import Batch, Precision
from forge_harness.quant import Compute, TernaryLinearOp
from forge_harness.training.data import DataSource, ReferenceData
from forge_harness.training.randomness import RandomState
from forge_harness.training.splits import split_task

SMALL_BYTE_LM = ByteLMConfig(width=128, heads=4, hidden=384)
"""459,392 parameters: eleven seeds of it cost what four of the default do."""

BuildModel = Callable[[str, int, Precision], nn.Module]
"""(task, seed, precision) -> a freshly initialised model in training mode."""
Loss = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> scalar training loss, the mean over the batch's targets."""


@dataclass(frozen=True, slots=True)
class Ingredients:
    """Model builder, data source and loss of a session.

    Attributes:
        build_model: Builds the model of a task.
        data: Where samples come from.
        loss: The training loss; None for cross-entropy with the recipe's label smoothing.
    """

    build_model: BuildModel
    data: DataSource
    loss: Loss | None = None


def ingredients(
    build_model: BuildModel | None = None,
    load: DataSource | None = None,
    loss: Loss | None = None,
) -> Ingredients:
    """Returns the given parts, with those of the reference pipeline for what is None."""
    return Ingredients(
        build_model=reference_model if build_model is None else build_model,
        data=ReferenceData() if load is None else load,
        loss=loss,
    )


def reference_model(
    task: str,
    seed: int,
    precision: Precision = "ternary",
    *,
    linear: LinearFunction | None = None,
) -> nn.Module:
    """Builds the reference model of a task; the random state of the process stays as it is.

    Args:
        task: `digits` or `bytes`, a variant allowed.
        seed: Of the initial weights; both precisions draw the same.
        precision: "ternary" or "full".
        linear: Arithmetic of the ternary layers; None: `TernaryLinearOp()`.
    """
    with RandomState(seed).active():
        name, variant = split_task(task)
        if name == "digits":
            return DigitsModel(linear=linear, precision=precision)
        config = SMALL_BYTE_LM if variant == "small" else ByteLMConfig()
        return ByteLM(config, linear=linear, precision=precision)


def training_loss(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Returns the mean cross-entropy over all targets of a batch, in nats.

    Args:
        model: Maps inputs to logits (..., classes), in any floating dtype.
        batch: Inputs, and int64 targets of the logits' leading shape.
        label_smoothing: Share of the target's mass spread over all classes.
    """
    logits = model(batch.inputs).float()
    return F.cross_entropy(
        logits.flatten(0, -2), batch.targets.flatten(), label_smoothing=label_smoothing
    )


def set_compute(model: nn.Module, compute: Compute) -> int:
    """Switches the arithmetic of the layers that use `TernaryLinearOp`; returns how many."""
    switched = 0
    for module in model.modules():
        if isinstance(module, BitLinear) and isinstance(module.linear, TernaryLinearOp):
            module.linear = replace(module.linear, compute=compute)
            switched += 1
    return switched


@torch.no_grad()
def scale_residual_outputs(model: nn.Module, gain: float) -> None:
    """Multiplies the weights that write into the residual stream of a reference model."""
    for name, module in model.named_modules():
        if isinstance(module, BitLinear) and name.rpartition(".")[2] in ("o", "down"):
            module.weight.mul_(gain)
