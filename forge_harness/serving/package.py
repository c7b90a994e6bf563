"""The model of a package, packed, and what it wants of a request."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from forge_harness.errors import CheckpointError
from forge_harness.formats.detect import open_checkpoint
from forge_harness.model import ByteLM, DigitsModel, PackedLM, pack_model
from forge_harness.model.from_checkpoint import model_from_checkpoint
from forge_harness.paths import resolved_path

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

_CANARY_ROWS = 2
_CANARY_PROMPT = b"forge"
_FULL_PRECISION = ("legacy-safetensors", "legacy-pt")
"""Formats whose matrices are quantized as they are read, trained for it or not."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Classifier:
    """A packed classifier.

    Attributes:
        name: Of the package.
        model: Maps fp32 (B, inputs) to logits (B, classes); every row has the bits it has alone.
        inputs: Features.
        classes: Labels.
        canary: fp32 (2, inputs).
        expected: Logits of the canary, from the model before it was packed.
    """

    name: str
    model: nn.Module
    inputs: int
    classes: int
    canary: NDArray[np.float32]
    expected: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Completer:
    """A packed language model over bytes.

    Attributes:
        name: Of the package.
        model: Never called itself: sequences decode on forks of it.
        vocabulary: Token ids are below it.
        context: Most tokens of prompt and completion.
        canary: Tokens of a prompt.
        expected: Logits (T, V) of the canary, from the packed model when it was loaded.
    """

    name: str
    model: PackedLM
    vocabulary: int
    context: int
    canary: tuple[int, ...]
    expected: NDArray[np.float32]


Served = Classifier | Completer


def load_served(path: Path, *, threads: int = 1) -> Served:
    """Loads a package and proves on a canary that packing changed nothing.

    Args:
        path: A package as `forge-harness train` writes it, or another readable checkpoint of the
            same families.
        threads: Of every inference of this process.

    Raises:
        CheckpointError: It cannot be read, is of a family that is not served, has no ternary layer,
            or its packed model answers otherwise than the model itself.
    """
    torch.set_num_threads(threads)
    with open_checkpoint(path) as checkpoint:
        model = model_from_checkpoint(checkpoint)
        if checkpoint.format in _FULL_PRECISION:
            _log.warning(
                "The weights in %r are full precision (%s) and were quantized as they were read: "
                "a model that was not trained for it answers worse than the one you have; train it "
                "with `forge-harness train --from-checkpoint`.",
                str(path),
                checkpoint.format,
            )
    if not model.quantized_names():
        raise CheckpointError(
            f"No layer of {str(path)!r} is ternary; expected a package of a ternary model: train "
            "with --precision ternary."
        )
    name = _name(path)
    if isinstance(model, DigitsModel):
        return _classifier(name, model)
    if isinstance(model, ByteLM):
        return _completer(name, model)
    raise CheckpointError(
        f"{str(path)!r} holds a {type(model).__name__}; digits and byte-lm models are served."
    )


def describe(served: Served) -> Mapping[str, Any]:
    """Returns what clients may know of the model, as JSON values."""
    if isinstance(served, Classifier):
        sizes = {"inputs": served.inputs, "classes": served.classes}
        return {"id": served.name, "route": "/v1/predict", **sizes}
    sizes = {"vocabulary": served.vocabulary, "context": served.context}
    return {"id": served.name, "route": "/v1/completions", **sizes}


def _name(path: Path) -> str:
    resolved = resolved_path(path)
    return resolved.parent.name if resolved.name == "package" else resolved.name


@torch.inference_mode()
def _classifier(name: str, model: DigitsModel) -> Classifier:
    packed = pack_model(model)
    draw = np.random.default_rng(0)
    canary = draw.random((_CANARY_ROWS, model.config.inputs), dtype=np.float32)
    expected = model(torch.from_numpy(canary)).numpy()
    answered = packed(torch.from_numpy(canary)).numpy()
    if expected.tobytes() != answered.tobytes():
        raise CheckpointError(
            f"The packed {name!r} answers a canary otherwise than the model it was made of "
            f"(by {float(np.abs(expected - answered).max()):.3g}); expected equal bits: run "
            "`forge-harness inspect` on the package."
        )
    config = model.config
    return Classifier(name, packed, config.inputs, config.classes, canary, expected)


@torch.inference_mode()
def _completer(name: str, model: ByteLM) -> Completer:
    packed = PackedLM(model)
    context, vocabulary = packed.context, model.config.vocabulary
    canary = tuple(byte % vocabulary for byte in _CANARY_PROMPT[:context])
    expected = canary_logits(packed, canary)
    if not np.isfinite(expected).all():
        raise CheckpointError(
            f"{name!r} answers a canary with logits that are not finite; run `forge-harness "
            "inspect` on the package."
        )
    return Completer(name, packed, vocabulary, context, canary, expected)


@torch.inference_mode()
def canary_logits(model: PackedLM, canary: Sequence[int]) -> NDArray[np.float32]:
    """Returns the logits (T, V) of a prompt, on a fork of the model."""
    logits: NDArray[np.float32] = model.fork().prefill(torch.tensor([list(canary)]))[0].numpy()
    return logits
