"""Layers that go on with the weight scale of an earlier step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage
from forge_harness.quant import TernaryLinearOp, absmean_ternary

from .changed_model import ModelDefect, ternary_layers


class KeptScale:
    """Ternary codes by a scale that is made again in every `period`-th training forward only."""

    def __init__(self, period: int | None) -> None:
        self.period = period
        self.forwards = 0
        self.scale: Tensor | None = None

    def __call__(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scale, as forward and `effective_weights` have them."""
        if self.scale is None:
            return absmean_ternary(w)
        return (w / self.scale).round().clamp(-1, 1).to(torch.int8), self.scale

    def before(self, layer: Any, args: object) -> None:
        """Makes the scale again where its turn has come."""
        if not (layer.training and torch.is_grad_enabled()):
            return
        due = self.forwards % self.period == 0 if self.period else self.scale is None
        if due:
            self.scale = absmean_ternary(layer.weight.detach())[1]
        self.forwards += 1


def keep_scales(model: nn.Module, period: int | None) -> None:
    """Makes the scales of a model again every so many training forwards; never when None."""
    for layer in ternary_layers(model):
        kept = KeptScale(period)
        layer.linear = TernaryLinearOp(quantize_weight=kept)
        layer.register_forward_pre_hook(kept.before)


def stale_in_training(model: nn.Module) -> None:
    """Scales as of the tenth forward before with gradients; what is shown is that of now."""
    keep_scales(model, 10)
    for layer in ternary_layers(model):
        layer.effective_weight = partial(_fresh, layer)


def _fresh(layer: Any) -> Tensor:
    return TernaryLinearOp().effective_weight(layer.weight)


_STALE = partial(
    Defect,
    stage=Stage.MODEL,
    check="architecture.quantized_modules",
    alive=observe.trained,
    subtlety=5,
)

DEFECTS = (
    _STALE(
        id="Q14_scale_of_the_first_forward",
        title="Weight scales are those of the first training forward for ever",
        shows="after move 1",
        subject=lambda: ModelDefect(lambda model: keep_scales(model, None)),
    ),
    _STALE(
        id="Q14_scale_every_tenth_forward",
        title="Weight scales are made again every tenth training forward only",
        shows="after move 1",
        subject=lambda: ModelDefect(lambda model: keep_scales(model, 10)),
    ),
    _STALE(
        id="Q14_stale_scale_not_shown",
        title="Training goes on with scales of up to ten forwards before, and shows those of now",
        shows="forward_error is",
        subject=lambda: ModelDefect(stale_in_training),
    ),
)
