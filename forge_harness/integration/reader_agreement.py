"""What a third-party reader computed, held against this package's decoding of the same files.

The reference is made of codes and scales decoded here, in integers and float64
(`forge_harness.oracles`): reader and reference share no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from forge_harness import oracles
from forge_harness.errors import UsageError
from forge_harness.formats.checkpoint import Checkpoint
from forge_harness.integration.third_party import TransformersReading
from forge_harness.model.from_checkpoint import model_from_checkpoint
from forge_harness.oracles.arrays import ArrayLike, Int64

LAYER_RTOL = 1e-6
"""Largest |reader - reference| over the largest |reference| of a layer, for the same input: both
sum the same products in fp32 at worst (worst seen over 28 layers: 3.7e-7)."""
FLIP_MAX_OVER_STD = 0.1
"""End-to-end limit where activation codes flipped, over the standard deviation of the logits: one
flipped code moves all later layers, so only gross errors can be told from it."""
FLIP_MEAN_OVER_STD = 0.01
"""The same for the mean difference."""
ROUNDING_MAX_OVER_STD = 1e-4
"""End-to-end limit where none did: 2e-5 of logits of deviation 8.7 was the most seen."""

Mode = Literal["rounding", "flipped codes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAgreement:
    """One ternary layer, fed the reader's own input.

    Attributes:
        name: Of the layer.
        relative_error: Largest |reader - reference| over the largest |reference|.
        codes_at_ties: Activation codes on which fp32, as the reader computes, and float64 differ.
        flipped_codes: Activation codes that differ in this package's own run of the whole model.
        codes: Activation codes of the layer's input.
    """

    name: str
    relative_error: float
    codes_at_ties: int
    flipped_codes: int
    codes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsAgreement:
    """Logits of two implementations of one model over the same tokens.

    Attributes:
        max_over_std: Largest difference over the standard deviation of the reference.
        mean_over_std: Mean absolute difference over it.
        mode: "rounding": no activation code differs anywhere. "flipped codes": at least one int8
            code landed on the other side of a tie, which moves everything after it.
        flipped_codes: Codes that differ, over all layers.
    """

    max_over_std: float
    mean_over_std: float
    mode: Mode
    flipped_codes: int

    @property
    def limits(self) -> tuple[float, float]:
        """Limits of `max_over_std` and `mean_over_std` in this mode."""
        if self.mode == "rounding":
            return ROUNDING_MAX_OVER_STD, ROUNDING_MAX_OVER_STD
        return FLIP_MAX_OVER_STD, FLIP_MEAN_OVER_STD


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """A reader held against this package's decoding of the same files."""

    layers: tuple[LayerAgreement, ...]
    logits: LogitsAgreement
    unread: tuple[str, ...]
    """Layers ternary to one of the two only."""


def compare(reading: TransformersReading, checkpoint: Checkpoint) -> Agreement:
    """Holds a reading, made with hooks, against codes and scales of the opened checkpoint.

    Raises:
        UsageError: The reader refused the files: there is nothing to compare.
        CheckpointError: This package cannot build the model.
    """
    if reading.arrays is None:
        raise UsageError(f"transformers refused the files ({reading.refused}); nothing to compare.")
    model = model_from_checkpoint(checkpoint)
    inputs: dict[str, Tensor] = {}
    for name in model.quantized_names():
        model.get_submodule(name).register_forward_pre_hook(_keep_input(inputs, name))
    with torch.no_grad():
        logits = model(torch.tensor(reading.tokens))
    shared = [name for name in reading.ternary if name in inputs]
    with safe_open(reading.arrays, framework="np") as arrays:
        layers = tuple(_layer(checkpoint, name, arrays, inputs[name]) for name in shared)
        flipped = sum(layer.flipped_codes for layer in layers)
        end_to_end = logits_agreement(arrays.get_tensor("logits"), logits, flipped)
    unread = tuple(sorted(set(reading.ternary) ^ set(inputs)))
    return Agreement(layers=layers, logits=end_to_end, unread=unread)


def logits_agreement(found: ArrayLike, reference: ArrayLike, flipped_codes: int) -> LogitsAgreement:
    """Compares logits of equal shape."""
    want = oracles.float64(reference)
    difference = np.abs(oracles.float64(found) - want)
    deviation = float(want.std()) or 1.0
    return LogitsAgreement(
        max_over_std=float(difference.max()) / deviation,
        mean_over_std=float(difference.mean()) / deviation,
        mode="flipped codes" if flipped_codes else "rounding",
        flipped_codes=flipped_codes,
    )


def _keep_input(inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_: object, arguments: tuple[Tensor, ...]) -> None:
        inputs[name] = arguments[0].detach().clone()

    return hook


def _layer(
    checkpoint: Checkpoint,
    name: str,
    arrays: Any,  # noqa: ANN401 - safetensors has no types
    own_input: Tensor,
) -> LayerAgreement:
    ternary = checkpoint.ternary(f"{name}.weight")
    x = arrays.get_tensor(f"{name}.input")
    q = _fp32_codes(x)
    exact = oracles.int8_tokens(x)
    bias = f"{name}.bias"
    expected = oracles.output(
        q,
        exact.scale,
        ternary.codes(),
        ternary.row_scales()[:, 0],
        checkpoint.plain(bias).float() if bias in checkpoint.infos else None,
    )
    difference = np.abs(oracles.float64(arrays.get_tensor(f"{name}.output")) - expected)
    return LayerAgreement(
        name=name,
        relative_error=float(difference.max() / max(float(np.abs(expected).max()), 1e-30)),
        codes_at_ties=int(np.count_nonzero(q != exact.codes)),
        flipped_codes=int(np.count_nonzero(q != _fp32_codes(own_input))),
        codes=q.size,
    )


def _fp32_codes(x: ArrayLike) -> Int64:
    """Activation codes in fp32, in the order all readers compute: x * (127 / max |x|).

    torch divides a number by a tensor as reciprocal times number, two roundings instead of one.
    """
    values = np.asarray(x, dtype=np.float32)
    absmax = np.maximum(np.abs(values).max(axis=-1, keepdims=True), np.float32(1e-5))
    factor = np.float32(1) / absmax * np.float32(127)
    codes = np.rint(values * factor).clip(-128, 127)
    found: Int64 = codes.astype(np.int64)
    return found
