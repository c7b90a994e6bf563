"""The reference subject: the BitNet b1.58 pipeline of this repository behind the protocols.

Every method may be overridden, and the models follow: a subclass that changes
`quantize_weight`, `quantize_activation` or `linear` changes what its models compute, and one
that changes `build_model`, `batch` or `epoch_order` changes what its sessions train on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from forge_harness import config, kernels, model, quant, training
from forge_harness.subject.protocols import (
    Arm,
    Batch,
    DataInfo,
    ModelSpec,
    Precision,
    QualityRun,
    QuantizationInfo,
    ResolvedConfig,
    ScheduleSpec,
    ScheduleStep,
    TrainingSession,
    TrainOptions,
)

Split = Literal["train", "validation"]
Compute = Literal["exact", "int8", "fake"]


class ReferenceSubject:
    """Offers every capability of `forge_harness.subject.protocols`."""

    name = "reference"

    def __deepcopy__(self, memo: dict[int, object]) -> ReferenceSubject:
        # Models hold bound methods of the subject; copying a model must not copy the subject.
        return self

    # Quantizes, QuantizesParts, Packs

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Quantizes.quantize_weight`."""
        return quant.absmean_ternary(weight)

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Quantizes.quantize_activation`."""
        return quant.absmax_int8(x)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Quantizes.linear`."""
        return self._op("exact")(x, weight, bias)

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Quantizes.integer_linear`."""
        return quant.integer_linear(x, weight)

    def quantize_weight_parts(self, weight: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `QuantizesParts.quantize_weight_parts`."""
        return quant.absmean_ternary_parts(weight, parts)

    def pack(self, codes: Tensor) -> Tensor:
        """See `Packs.pack`."""
        return quant.pack_i2(codes)

    def unpack(self, packed: Tensor, rows: int) -> Tensor:
        """See `Packs.unpack`."""
        return quant.unpack_i2(packed, rows)
