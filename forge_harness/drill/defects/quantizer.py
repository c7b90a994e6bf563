"""Quantizers with their scale, range, rounding or granularity exchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage
from forge_harness.subject.reference import ReferenceSubject

EPS = 1e-5
"""The reference quantizers' floor, of absmean and of absmax."""


class WeightDefect(ReferenceSubject):
    """A weight quantizer with its scale or its rounding exchanged."""

    def __init__(
        self,
        scale: Callable[[Tensor], Tensor] | None = None,
        rounding: Callable[[Tensor], Tensor] = torch.round,
    ) -> None:
        self.scale = scale or absmean
        self.rounding = rounding

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Ternary codes of `weight`, and the scale."""
        scale = self.scale(weight.detach())
        codes = self.rounding(weight.detach() / scale).clamp(-1, 1)
        return codes.to(torch.int8), scale


class ScaleDefect(ReferenceSubject):
    """The right codes with another scale beside them: `change(scale)`."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Ternary codes of `weight`, and what became of the scale."""
        codes, scale = super().quantize_weight(weight)
        return codes, self.change(scale)


class ActivationDefect(ReferenceSubject):
    """An activation quantizer with its absmax, range or rounding exchanged."""

    def __init__(
        self,
        absmax: Callable[[Tensor], Tensor] | None = None,
        steps: float = 127.0,
        rounding: Callable[[Tensor], Tensor] = torch.round,
    ) -> None:
        self.absmax = absmax or (lambda x: x.abs().amax(-1, keepdim=True).clamp(min=EPS))
        self.steps = steps
        self.rounding = rounding

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of `x`, and a scale a token."""
        absmax = self.absmax(x.detach())
        codes = self.rounding(x.detach() * (self.steps / absmax))
        # The cast wraps like a C cast does: no clamp.
        return codes.to(torch.int64).to(torch.int8), absmax / self.steps


class RemembersScale(ReferenceSubject):
    """The scale of a weight is computed once and kept beside it."""

    def quantize_weight(self, weight: Any) -> tuple[Tensor, Tensor]:
        """Codes of `weight` as it is, and the scale of what it was at first."""
        codes, scale = super().quantize_weight(weight)
        if not hasattr(weight, "remembered"):
            weight.remembered = scale
        return codes, weight.remembered


class WritesToWeight(ReferenceSubject):
    """The quantizer writes to the weight it reads."""

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scale of `weight`, which is 0.1 % larger afterwards."""
        with torch.no_grad():
            weight.mul_(1.001)
        return super().quantize_weight(weight)


class FloorOnScale(ReferenceSubject):
    """Floors absmax / 127 instead of absmax, and returns the scale without it."""

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of `x` by a scale that is not the one returned for small tokens."""
        absmax = x.detach().abs().amax(-1, keepdim=True)
        codes = (x.detach() / (absmax / 127).clamp(min=EPS)).round().clamp(-128, 127)
        return codes.to(torch.int8), (absmax / 127).clamp(min=1e-12)


class ScaleOverTime(ReferenceSubject):
    """The activation scale is taken over the sequence: shape (B, 1, 1), not (B, T, 1)."""

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of `x` by the largest magnitude of its sequence."""
        over = -2 if x.dim() > 2 else -1
        absmax = x.detach().abs().amax(over, keepdim=True).clamp(min=EPS)
        scale = absmax.amax(-1, keepdim=True) if over == -2 else absmax
        scale = scale.expand(*x.shape[:-1], 1) / 127
        return (x.detach() / scale).round().clamp(-128, 127).to(torch.int8), scale


class WritesToActivations(ReferenceSubject):
    """The quantizer scales and rounds in place, as mul_(...).round_() does."""

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scale of `x`, which holds the codes afterwards."""
        codes, scale = super().quantize_activation(x)
        with torch.no_grad():
            x.copy_(codes)
        return codes, scale


class SharedScale(ReferenceSubject):
    """A fused weight is quantized as one."""

    def quantize_weight_parts(self, weight: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Codes of the whole weight, and its scale as often as there are parts."""
        codes, scale = self.quantize_weight(weight)
        return codes, scale.expand(len(parts)).clone()


class PartsInReverse(ReferenceSubject):
    """The sizes of the parts are applied from the last to the first."""

    def quantize_weight_parts(self, weight: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Codes and scales of other parts, where their sizes differ."""
        return super().quantize_weight_parts(weight, list(parts)[::-1])


class ReadsByStorage(ReferenceSubject):
    """The quantizer walks the memory of a weight whatever its strides are."""

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scale of the numbers that lie where `weight` begins."""
        return super().quantize_weight(by_storage_order(weight))


def absmean(weight: Tensor) -> Tensor:
    """The scale as it should be."""
    return weight.abs().mean().clamp(min=EPS)


def half_up(values: Tensor) -> Tensor:
    """Rounds k + 1/2 up, as kernels that add a half and truncate do."""
    return torch.floor(values + 0.5)


def first_nonzero(weight: Tensor) -> Tensor:
    """The magnitude of the first weight that is not zero: right for what is ternary already."""
    values = weight.abs().flatten()
    return values[values > 0][:1].sum().clamp(min=EPS)


def mean_of_chunk_means(weight: Tensor) -> Tensor:
    """The means of chunks of 64 rows with equal weight, the smaller last chunk too."""
    chunks = [chunk.abs().mean() for chunk in torch.split(weight, 64)]
    return torch.stack(chunks).mean().clamp(min=EPS)


def mean_of_nonzero(weight: Tensor) -> Tensor:
    """The mean magnitude of what the first quantization leaves, as a ternary weight network's."""
    kept = weight.abs()[weight.abs() > 0.5 * absmean(weight)]
    return kept.sum().div(max(kept.numel(), 1)).clamp(min=EPS)


def nearly_absmax(x: Tensor) -> Tensor:
    """The 99th percentile of the magnitudes in the place of their maximum."""
    return x.abs().quantile(0.99, dim=-1, keepdim=True).clamp(min=EPS)


def by_storage_order(values: Tensor) -> Tensor:
    """As many numbers as `values` has, from its first on as they lie in memory."""
    contiguous = torch.empty(values.shape, device="meta").stride()
    reach = values.storage_offset() + values.numel()
    if reach > values.untyped_storage().nbytes() // values.element_size():
        return values
    return values.detach().as_strided(values.shape, contiguous, values.storage_offset())


def codes_of_parts(subject: Any) -> object:
    """Codes and scales of a fused weight whose parts differ in magnitude."""
    return subject.quantize_weight_parts(observe.weights()[1], (48, 32, 16))


def codes_of_a_transposed_weight(subject: Any) -> object:
    """Codes and scale of a weight that lies in memory column by column."""
    weight = observe.weights()[1].t().contiguous().t()
    return subject.quantize_weight(nn.Parameter(weight))


def activations_afterwards(subject: Any) -> object:
    """Activations after they were quantized."""
    inputs = [x.clone() for x in observe.activations()]
    for x in inputs:
        subject.quantize_activation(x)
    return inputs


_WEIGHT = partial(Defect, stage=Stage.QUANTIZER, alive=observe.weight_codes)
_SCALE = partial(_WEIGHT, check="architecture.weight_scale", shows="scale_error is")
_PARTS = partial(
    _WEIGHT,
    check="architecture.fused_projection_scales",
    shows="scale_error is",
    alive=codes_of_parts,
)
_ROUNDING = partial(_WEIGHT, check="architecture.weight_rounding", shows="tie_errors is")
_ACTIVATION = partial(Defect, stage=Stage.QUANTIZER, alive=observe.activation_codes)
_RANGE = partial(_ACTIVATION, check="architecture.activation_range")

_WEIGHT_SCALES = (
    _SCALE(
        id="Q03_reciprocal_scale",
        title="The weight scale returned is 1 / absmean, for code that multiplies by it",
        subject=lambda: ScaleDefect(lambda scale: 1 / scale),
        source="microsoft/BitNet#616",
        subtlety=2,
    ),
    _SCALE(
        id="Q11_absmax_scale",
        title="The ternary scale is absmax instead of absmean",
        subject=lambda: WeightDefect(lambda w: w.abs().amax()),
        source="microsoft/BitNet#383",
        subtlety=2,
    ),
    _SCALE(
        id="mean_of_the_kept",
        title="The scale is the mean of the weights above the threshold, not of all",
        subject=lambda: WeightDefect(mean_of_nonzero),
    ),
    _SCALE(
        id="median_scale",
        title="The scale is the median magnitude instead of the mean",
        subject=lambda: WeightDefect(lambda w: w.abs().median().clamp(min=EPS)),
    ),
    _SCALE(
        id="centred_weight",
        title="The mean is taken off the weight before its scale is computed",
        subject=lambda: WeightDefect(lambda w: absmean(w - w.mean())),
    ),
    _SCALE(
        id="Q13_first_nonzero",
        title="The scale is the magnitude of the first weight that is not zero",
        subject=lambda: WeightDefect(first_nonzero),
        source="microsoft/BitNet convert-hf-to-gguf-bitnet.py",
        subtlety=4,
    ),
    _SCALE(
        id="Q15_chunk_means",
        title="The scale is the mean of chunk means, with a smaller last chunk",
        subject=lambda: WeightDefect(mean_of_chunk_means),
        subtlety=4,
    ),
    _SCALE(
        id="Q10_scale_per_row",
        title="One weight scale a row where one a weight is declared",
        shows="scales_not_scalar is",
        subject=lambda: WeightDefect(lambda w: w.abs().mean(1, keepdim=True)),
        source="pytorch/ao#4518",
        subtlety=4,
    ),
    _SCALE(
        id="Q14_stale_scale",
        title="The weight scale is computed once and kept when the weight moves",
        shows="scale_error_after_update is",
        subject=RemembersScale,
        source="pytorch/ao prototype/quantized_training/bitnet.py",
        subtlety=4,
    ),
    _SCALE(
        id="Q20_writes_to_weight",
        title="The weight quantizer changes the latent weight in place",
        subject=WritesToWeight,
        subtlety=4,
    ),
    _SCALE(
        id="P14_bf16_scale",
        title="The weight scale is rounded to bf16, the codes are made with the fp32 one",
        subject=lambda: ScaleDefect(lambda scale: scale.bfloat16().float()),
        source="microsoft/BitNet gpu/convert_checkpoint.py",
        subtlety=5,
    ),
    _SCALE(
        id="mean_in_bf16",
        title="The absolute mean is taken in bf16",
        subject=lambda: WeightDefect(lambda w: absmean(w.bfloat16()).float()),
        subtlety=5,
    ),
    _SCALE(
        id="K10_weight_by_storage_order",
        title="The weight quantizer takes a transposed weight for a contiguous one",
        subject=ReadsByStorage,
        alive=codes_of_a_transposed_weight,
        source="tiiuae/onebitllms activation_quant_triton",
        subtlety=4,
    ),
    _WEIGHT(
        id="Q04_no_weight_floor",
        title="The scale of an all-zero weight is zero",
        check="architecture.zero_and_tiny_rows",
        shows="scale_of_zero_weight is",
        subject=lambda: WeightDefect(lambda w: w.abs().mean()),
        source="ggml-org/llama.cpp#7313",
    ),
    _WEIGHT(
        id="Q13_scale_by_position",
        title="Which weight comes first decides the scale",
        check="architecture.permutation_relations",
        shows="scale_change is",
        subject=lambda: WeightDefect(first_nonzero),
        source="microsoft/BitNet convert-hf-to-gguf-bitnet.py",
        subtlety=4,
    ),
    _PARTS(
        id="one_scale_for_all_parts",
        title="Fused projections share one scale",
        subject=SharedScale,
    ),
    _PARTS(
        id="parts_in_reverse",
        title="Fused projections are split by their sizes in reverse: key sizes for query rows",
        subject=PartsInReverse,
    ),
)

_WEIGHT_CODES = (
    _ROUNDING(
        id="Q06_half_up_weights",
        title="Weights exactly between two codes round up instead of to even",
        subject=lambda: WeightDefect(rounding=half_up),
        source="tiiuae/onebitllms kernels",
        subtlety=4,
    ),
    _ROUNDING(
        id="Q06_half_away_weights",
        title="Weights exactly between two codes round away from zero, as C's lround does",
        subject=lambda: WeightDefect(rounding=lambda w: w.sign() * half_up(w.abs())),
        source="ggml-org/ggml quantize_row_tq2_0_ref",
        subtlety=4,
    ),
    _ROUNDING(
        id="Q08_truncated_weights",
        title="Weights are cast to their codes without rounding",
        shows="first: one_ulp_above_half",
        subject=lambda: WeightDefect(rounding=torch.trunc),
    ),
    _ROUNDING(
        id="Q12_sign",
        title="Weight codes are signs: hardly any zero is left",
        shows="tie_errors is 17 codes",
        subject=lambda: WeightDefect(rounding=torch.sign),
        source="microsoft/BitNet quantize_i2_s",
        subtlety=2,
    ),
    _ROUNDING(
        id="threshold_of_another_method",
        title="Weights below 0.7 of the mean become zero, the threshold of another method",
        shows="first: one_ulp_above_half",
        subject=lambda: WeightDefect(rounding=lambda w: w.sign() * (w.abs() > 0.7)),
    ),
)

_ACTIVATIONS = (
    _ACTIVATION(
        id="Q01_over_time",
        title="The activation scale is taken over the sequence",
        check="architecture.activation_scale",
        shows="scale_error is",
        subject=ScaleOverTime,
        source="joey00072/ohara#11",
    ),
    _ACTIVATION(
        id="Q02_per_tensor",
        title="One activation scale for all tokens of a batch",
        check="architecture.activation_scale",
        shows="scale_error is",
        subject=lambda: ActivationDefect(lambda x: x.abs().amax().expand(*x.shape[:-1], 1)),
        source="pytorch/executorch#22432",
        subtlety=4,
    ),
    _ACTIVATION(
        id="percentile_for_absmax",
        title="The activation scale is the 99th percentile, and what is larger wraps",
        check="architecture.activation_scale",
        shows="scale_error is",
        subject=lambda: ActivationDefect(nearly_absmax),
    ),
    _RANGE(
        id="Q07_wraps",
        title="Activations are scaled to 128 and cast without a clamp: the largest changes sign",
        shows="sign_changes is",
        subject=lambda: ActivationDefect(steps=128.0),
        source="pytorch/ao#805",
    ),
    _RANGE(
        id="Q08_truncated",
        title="Activations are cast to their codes without rounding",
        shows="off_full_range is",
        subject=lambda: ActivationDefect(rounding=torch.trunc),
        source="pytorch/ao#1964",
    ),
    _RANGE(
        id="Q06_half_up",
        title="Activations exactly between two codes round up instead of to even",
        shows="tie_errors is",
        subject=lambda: ActivationDefect(rounding=half_up),
        source="tiiuae/onebitllms kernels",
        subtlety=4,
    ),
    _RANGE(
        id="four_bits",
        title="Activation codes have four bits",
        shows="tokens_off_full_range is",
        subject=lambda: ActivationDefect(steps=7.0),
        subtlety=1,
    ),
    _RANGE(
        id="seven_bits",
        title="Activation codes have seven bits: half the range is never used",
        shows="tokens_off_full_range is",
        subject=lambda: ActivationDefect(steps=63.0),
        subtlety=2,
    ),
    _RANGE(
        id="floor_on_scale",
        title="The floor stands under the activation scale instead of under the absmax",
        shows="tokens_off_full_range is",
        subject=FloorOnScale,
        source="pytorch/ao",
        subtlety=4,
    ),
    _ACTIVATION(
        id="floor_on_scale_tiny",
        title="Tiny tokens are coded by another scale than the one returned",
        check="architecture.zero_and_tiny_rows",
        shows="rounding_error is",
        subject=FloorOnScale,
        source="pytorch/ao",
        subtlety=4,
    ),
    _ACTIVATION(
        id="Q04_no_floor",
        title="The scale of an all-zero token is zero",
        check="architecture.zero_and_tiny_rows",
        shows="bad_scales is",
        subject=lambda: ActivationDefect(lambda x: x.abs().amax(-1, keepdim=True)),
        source="ggml-org/llama.cpp#7313",
    ),
    _ACTIVATION(
        id="Q06_half_up_sign",
        title="Half up: the codes of -x are not those of x negated",
        check="architecture.sign_and_scale_relations",
        shows="code_errors is",
        subject=lambda: ActivationDefect(rounding=half_up),
        source="tiiuae/onebitllms kernels",
        subtlety=4,
    ),
    _ACTIVATION(
        id="Q20_writes_to_activations",
        title="The activation quantizer changes what other projections read after it",
        check="architecture.fake_quant_agrees",
        shows="training_forward_error is",
        subject=WritesToActivations,
        alive=activations_afterwards,
        subtlety=4,
    ),
    _ACTIVATION(
        id="Q01_scale_sees_future",
        title="Later tokens move earlier outputs through the activation scale",
        check="architecture.causal_mask",
        shows="bytes.leak is",
        subject=ScaleOverTime,
        source="joey00072/ohara#11",
    ),
)

DEFECTS = (*_WEIGHT_SCALES, *_WEIGHT_CODES, *_ACTIVATIONS)
