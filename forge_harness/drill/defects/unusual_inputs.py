"""Defects that show only with what a fresh model and a random batch never hold.

Gains other than 1, values that are not finite, and a caller who looks at his tensor afterwards.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage
from forge_harness.drill.defects.changed_model import (
    ModelDefect,
    normed_layers,
    replace_forward,
)
from forge_harness.quant import absmean_ternary, fake_quantize_activation
from forge_harness.subject.reference import ReferenceSubject


def _quantized_gain(module: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
    codes, scale = absmean_ternary(module.weight.detach()[None])
    replaced: Tensor = out / module.weight * (codes * scale)[0]
    return replaced


def quantize_gains(model: nn.Module) -> None:
    """Makes every norm multiply by ternary gains."""
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(_quantized_gain)


def _quantized_before_norm(layer: Any, x: Tensor) -> Tensor:
    return F.linear(layer.norm(fake_quantize_activation(x)), layer.effective_weight())


def quantize_before_norm(model: nn.Module) -> None:
    """Makes layers that hold a norm quantize what goes into it, not what comes out of it."""
    for layer in normed_layers(model):
        replace_forward(layer, _quantized_before_norm)


def drop_tied_key(model: nn.Module) -> None:
    """Saves a tied tensor under one of its names only; loading stays strict."""
    for name, module in model.named_modules():
        if name == "head":
            module._register_state_dict_hook(_without_weight)


def _without_weight(module: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    del state[f"{prefix}weight"]


class HidesBadActivations(ReferenceSubject):
    """A NaN or an infinity in a token is made a number before it is quantized."""

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of what is left of `x`."""
        return super().quantize_activation(torch.nan_to_num(x))


class HidesBadWeights(ReferenceSubject):
    """A NaN or an infinity in a weight is made a number before it is quantized."""

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of what is left of `weight`."""
        return super().quantize_weight(torch.nan_to_num(weight))


class LeavesQuantizedValues(ReferenceSubject):
    """The quantizer writes the values of its codes into the caller's tensor."""

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales; `x` is changed where it is contiguous."""
        codes, scale = super().quantize_activation(x)
        if x.is_contiguous():
            with torch.no_grad():
                x.copy_(codes * scale)
        return codes, scale


def not_finite(subject: Any) -> object:
    """Outputs of a linear layer for a NaN in a token and in the weight."""
    x, weight = torch.ones(2, 8), torch.ones(3, 8)
    bad = torch.full((1, 8), torch.nan)
    return subject.linear(torch.cat([x, bad]), weight), subject.linear(x, torch.cat([weight, bad]))


def input_afterwards(subject: Any) -> object:
    """The caller's activations after they were quantized."""
    seen = observe.activations()
    for x in seen:
        subject.quantize_activation(x)
    return seen


def with_other_gains(subject: Any) -> object:
    """Outputs of the models whose 1-D parameters are not 1."""
    seen = []
    for task in subject.tasks():
        model = subject.build_model(task, seed=3)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:
                    p.mul_(torch.linspace(0.5, 1.5, p.numel()))
        seen.append(subject.loss(model, subject.example_batch(task, batch_size=5, seed=3)))
    return seen


def keys_saved(subject: Any) -> object:
    """The names in each model's state dict."""
    return [list(subject.build_model(task, seed=3).state_dict()) for task in subject.tasks()]


_HIDES = partial(
    Defect,
    stage=Stage.QUANTIZER,
    check="architecture.zero_and_tiny_rows",
    shows="hidden_non_finite is",
    alive=not_finite,
    source="ggml-org/ggml@917c9962",
    subtlety=4,
)

DEFECTS = (
    Defect(
        id="Q18_norm_gains_quantized",
        title="The gains of norms are quantized to ternary values",
        stage=Stage.MODEL,
        check="architecture.sub_norm_present",
        shows="numb_gains is",
        subject=lambda: ModelDefect(quantize_gains),
        alive=with_other_gains,
        source="tiiuae/onebitllms",
        subtlety=4,
    ),
    Defect(
        id="L03_quantizes_before_norm",
        title="Activations are quantized before the norm instead of after it",
        stage=Stage.MODEL,
        check="architecture.quantized_modules",
        shows="forward_error is",
        subject=lambda: ModelDefect(quantize_before_norm),
        alive=with_other_gains,
        source="Beomi/BitNet-Transformers#5",
        subtlety=4,
    ),
    Defect(
        id="C16_tied_key_dropped",
        title="A tied tensor is saved under one name, and strict loading misses the other",
        stage=Stage.MODEL,
        check="architecture.state_dict_round_trip",
        shows="strict_load is",
        subject=lambda: ModelDefect(drop_tied_key, task="bytes"),
        alive=keys_saved,
        source="huggingface/transformers#38870",
        subtlety=3,
    ),
    _HIDES(
        id="K11_nan_swallowed",
        title="A NaN in a token is quantized like a zero",
        subject=HidesBadActivations,
    ),
    _HIDES(
        id="K11_nan_weight_swallowed",
        title="A NaN in a weight is quantized like a zero",
        subject=HidesBadWeights,
    ),
    Defect(
        id="Q20_leaves_quantized_values",
        title="The activation quantizer writes the quantized values into its input",
        stage=Stage.QUANTIZER,
        check="architecture.activation_scale",
        shows="inputs_changed is",
        subject=LeavesQuantizedValues,
        alive=input_afterwards,
        source="huggingface/transformers integrations/bitnet.py",
        subtlety=5,
    ),
)
