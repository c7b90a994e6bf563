"""Sound models of another kind than the reference's: no check of the architecture may be red."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.drill.defect import Benign
from forge_harness.protocols import Batch, ModelSpec, QuantizationInfo
from forge_harness.subject.reference import ReferenceSubject

from .quantizer import EPS

PRE_NORMS = tuple(f"blocks.{i}.{n}" for i in range(2) for n in ("attention_norm", "ffn_norm"))


class Dropout(ReferenceSubject):
    """Dropout of 0.1 in front of the head, in training mode."""

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The reference model with dropout."""
        model = super().build_model(task, seed=seed)
        model.get_submodule("head").register_forward_pre_hook(_drop)
        return model


def _drop(module: nn.Module, args: Any) -> tuple[Tensor]:
    return (F.dropout(args[0], 0.1, training=module.training),)


class InMapping(nn.Module):
    """Answers with a mapping that has a scalar in front, as transformers' outputs may."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Mapping[str, Tensor]:
        """The logits behind a loss."""
        return {"auxiliary_loss": torch.zeros(()), "logits": self.inner(x)}


class AnswersWithAMapping(ReferenceSubject):
    """Models whose output is a mapping; the loss takes the logits out of it."""

    def model_spec(self, task: str) -> ModelSpec:
        """The declaration, names one level further in."""
        spec = super().model_spec(task)
        return replace(
            spec,
            quantized=_inner(spec.quantized),
            full_precision=_inner(spec.full_precision),
            sub_norms=_inner(spec.sub_norms),
            tied=tuple((f"inner.{first}", f"inner.{second}") for first, second in spec.tied),
        )

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The reference model inside another."""
        return InMapping(super().build_model(task, seed=seed))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy of the logits in the mapping."""
        logits = model(batch.inputs)["logits"]
        return F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten())


def _inner(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"inner.{name}" for name in names)


class SaysRowsAndHasOne(ReferenceSubject):
    """Declares one scale a row and computes with one a weight: what is there is measured."""

    def quantization_info(self, task: str) -> QuantizationInfo:
        """The declaration of a scale a row."""
        return replace(super().quantization_info(task), granularity="row")


class ScaleARow(SaysRowsAndHasOne):
    """Declares one scale a row, and quantizes so."""

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Ternary codes of `weight` and a scale for each row."""
        scale = weight.abs().mean(dim=1, keepdim=True).clamp(min=EPS)
        return (weight / scale).round().clamp(-1, 1).to(torch.int8), scale.flatten()


class LayerNorms(ReferenceSubject):
    """Sub-norms are LayerNorm, whose bias is not zero."""

    def model_spec(self, task: str) -> ModelSpec:
        """The declaration, with the biases of two norms."""
        spec = super().model_spec(task)
        return replace(spec, parameters=spec.parameters + 256) if task == "digits" else spec

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """The reference model with LayerNorms."""
        model = super().build_model(task, seed=seed)
        blocks: Any = model.blocks
        generator = torch.Generator().manual_seed(seed)
        for block in blocks if task == "digits" else ():
            norm = nn.LayerNorm(128)
            with torch.no_grad():
                norm.bias.copy_(0.1 * torch.randn(128, generator=generator))
            block.down.norm = norm
        return model


class DeclaresPreNorms(ReferenceSubject):
    """The norms in front of attention and feed-forward are declared as well."""

    def model_spec(self, task: str) -> ModelSpec:
        """The declaration with the norms of the language model's blocks."""
        spec = super().model_spec(task)
        return replace(spec, sub_norms=PRE_NORMS) if task == "bytes" else spec


BENIGN = (
    Benign(
        id="dropout_before_the_head",
        title="Dropout in training mode",
        subject=Dropout,
        checks=("architecture",),
    ),
    Benign(
        id="outputs_in_a_mapping",
        title="The model answers with a mapping that has a scalar in front of the logits",
        subject=AnswersWithAMapping,
        checks=("architecture",),
    ),
    Benign(
        id="scale_a_row_declared",
        title="One weight scale a row, declared",
        subject=ScaleARow,
        checks=("architecture",),
        but=(
            "architecture.bias_outside_scale",
            "architecture.fake_quant_agrees",
            "architecture.integer_path_exact",
            "architecture.permutation_relations",
            "architecture.weight_rounding",
            "architecture.weight_scale",
            "architecture.zero_and_tiny_rows",
        ),
    ),
    Benign(
        id="rows_declared_one_scale",
        title="One scale a row is declared and one a weight computed with",
        subject=SaysRowsAndHasOne,
        checks=("architecture.weight_scale",),
    ),
    Benign(
        id="layer_norms_with_bias",
        title="Sub-norms are LayerNorms with a bias",
        subject=LayerNorms,
        checks=("architecture",),
    ),
    Benign(
        id="pre_norms_declared",
        title="The norms in front of whole blocks are declared as sub-norms too",
        subject=DeclaresPreNorms,
        checks=("architecture",),
    ),
)
"""Sound variants."""
