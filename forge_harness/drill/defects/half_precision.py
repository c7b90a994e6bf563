"""What is computed in bfloat16: quantizers given bf16, and the angles of positions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from forge_harness.drill import observe
from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.subject.reference import ReferenceSubject

from .changed_model import ModelDefect, replace_forward
from .quantizer import EPS, absmean


class Bf16Scale(ReferenceSubject):
    """The scales of bf16 input are computed in bf16 and said in fp32; the codes are right."""

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Ternary codes of `weight`, and a rounded mean."""
        codes, _ = super().quantize_weight(weight)
        return codes, absmean(weight.detach()).float()

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of `x`, and rounded 127ths of the largest magnitudes."""
        codes, _ = super().quantize_activation(x)
        return codes, (_absmax(x) / 127).float()


class Bf16Codes(ReferenceSubject):
    """The codes of bf16 input are computed in bf16; the scales are right."""

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Ternary codes of quotients that were rounded before."""
        _, scale = super().quantize_weight(weight)
        codes = (weight.detach() / absmean(weight.detach())).round().clamp(-1, 1)
        return codes.to(torch.int8), scale

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of products that were rounded before."""
        _, scale = super().quantize_activation(x)
        codes = (x.detach() * (127 / _absmax(x))).round().clamp(-128, 127)
        return codes.to(torch.int8), scale


class SaysBf16(Bf16Codes):
    """Computes in the dtype of its input and says so, as layers of transformers do."""

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scale, both computed as the input is."""
        return super().quantize_weight(weight)[0], absmean(weight.detach())

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales, all computed as the input is."""
        return super().quantize_activation(x)[0], _absmax(x) / 127


class UpcastsWithReciprocal(ReferenceSubject):
    """Computes in fp32 whatever it is given, by reciprocals, as AutoBitLinear does."""

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of products with 1 / scale."""
        values = weight.detach().float()
        scale = 1.0 / absmean(values)
        return (values * scale).round().clamp(-1, 1).to(torch.int8), 1.0 / scale

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of products with 127 / absmax."""
        values = x.detach().float()
        scale = 127 / _absmax(values)
        return (values * scale).round().clamp(-128, 127).to(torch.int8), 1.0 / scale


class TakesFloat32(ReferenceSubject):
    """Refuses everything but fp32."""

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scale of an fp32 weight."""
        return super().quantize_weight(_float32(weight))

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of fp32 activations."""
        return super().quantize_activation(_float32(x))


def _float32(values: Tensor) -> Tensor:
    if values.dtype != torch.float32:
        raise TypeError(f"expected float32, got {values.dtype}")
    return values


def _absmax(x: Tensor) -> Tensor:
    return x.detach().abs().amax(-1, keepdim=True).clamp(min=EPS)


def bf16_weights(subject: Any) -> object:
    """Codes and scales of weights in bf16."""
    return [subject.quantize_weight(weight.bfloat16()) for weight in observe.weights()]


def bf16_activations(subject: Any) -> object:
    """Codes and scales of activations in bf16."""
    return [subject.quantize_activation(x.bfloat16()) for x in observe.activations()]


def angles_in_bf16(model: Any) -> None:
    """Makes the tables of the rotary embedding from angles in bf16."""
    angles = _angles(model, torch.bfloat16)
    model.rope_cos.copy_(angles.cos())
    model.rope_sin.copy_(angles.sin())


def angles_in_bf16_each_time(model: Any) -> None:
    """Makes the angles in every forward pass, as they come out of an autocast region."""
    replace_forward(model, partial(_forward_with_angles, dtype=torch.bfloat16, first=0))


def angles_each_time(model: Any) -> None:
    """Makes fp32 angles in every forward pass, counts positions from 1, and uses sines elsewhere.

    Rotary embedding knows distances only: where counting starts is nothing to it.
    """
    replace_forward(model, partial(_forward_with_angles, dtype=torch.float32, first=1))
    model.norm.register_forward_hook(lambda module, args, out: out + 0.1 * out.sin())


def _forward_with_angles(model: Any, tokens: Tensor, *, dtype: torch.dtype, first: int) -> Tensor:
    angles = _angles(model, dtype, first).float()
    model.rope_cos.copy_(angles.cos())
    model.rope_sin.copy_(angles.sin())
    logits: Tensor = type(model).forward(model, tokens)
    return logits


def _angles(model: Any, dtype: torch.dtype, first: int = 0) -> Tensor:
    context, half = model.rope_cos.shape
    frequency = model.config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    positions = torch.arange(first, first + context)
    angles: Tensor = positions.to(dtype)[:, None] * frequency.to(dtype)
    return angles


def _turned(change: Any) -> ModelDefect:
    def if_rotary(model: nn.Module) -> None:
        if hasattr(model, "rope_cos"):
            change(model)

    return ModelDefect(if_rotary)


_WEIGHT = partial(Defect, stage=Stage.QUANTIZER, alive=bf16_weights, subtlety=5)
_ACTIVATION = partial(Defect, stage=Stage.QUANTIZER, alive=bf16_activations, subtlety=5)
_ANGLES = partial(
    Defect,
    stage=Stage.MODEL,
    check="architecture.quantized_modules",
    shows="bytes.angle_error is",
    alive=observe.built,
    source="pytorch/torchtitan#2575",
    subtlety=4,
)

DEFECTS = (
    _WEIGHT(
        id="bf16_weight_scale",
        title="The absolute mean of a bf16 weight is taken in bf16 and returned as fp32",
        check="architecture.weight_scale",
        shows="bf16_scale_error is",
        subject=Bf16Scale,
        source="tiiuae/onebitllms quantize_to_1bit",
    ),
    _WEIGHT(
        id="bf16_weight_codes",
        title="The codes of a bf16 weight are made in bf16: weights near the threshold change",
        check="architecture.weight_rounding",
        shows="bf16_code_errors is",
        subject=Bf16Codes,
        source="microsoft/BitNet gpu/convert_checkpoint.py",
    ),
    _ACTIVATION(
        id="bf16_activation_scale",
        title="The scales of bf16 tokens are rounded to bf16 and returned as fp32",
        check="architecture.activation_scale",
        shows="bf16_scale_error is",
        subject=Bf16Scale,
        source="pytorch/ao prototype/quantized_training/bitnet.py",
    ),
    _ACTIVATION(
        id="bf16_activation_codes",
        title="The codes of bf16 tokens are made in bf16: one in eight is off by one",
        check="architecture.activation_range",
        shows="bf16_code_errors is",
        subject=Bf16Codes,
        source="huggingface/transformers integrations/bitnet.py",
    ),
    _ANGLES(
        id="L13_angles_in_bf16",
        title="The tables of the rotary embedding are made from angles in bf16",
        subject=lambda: _turned(angles_in_bf16),
    ),
    _ANGLES(
        id="L13_angles_in_bf16_each_time",
        title="The forward pass rounds its position angles to bf16 before their cosine in fp32",
        subject=lambda: _turned(angles_in_bf16_each_time),
    ),
)

_QUANTIZERS = (
    "architecture.weight_scale",
    "architecture.weight_rounding",
    "architecture.activation_scale",
    "architecture.activation_range",
)

BENIGN = (
    Benign(
        id="says_bf16",
        title="Computes in the dtype of its input, and returns scales of that dtype",
        subject=SaysBf16,
        checks=_QUANTIZERS,
    ),
    Benign(
        id="upcasts_with_reciprocal",
        title="Computes in fp32 whatever it is given, with reciprocals",
        subject=UpcastsWithReciprocal,
        checks=_QUANTIZERS,
    ),
    Benign(
        id="takes_float32_only",
        title="Refuses everything but fp32",
        subject=TakesFloat32,
        checks=_QUANTIZERS,
    ),
    Benign(
        id="angles_each_time",
        title="Position angles made in each forward pass, from 1 on, and sines of other things",
        subject=lambda: _turned(angles_each_time),
        checks=("architecture",),
    ),
)
