"""torchao's BitNet training as a peer: its weights in the place of a model's own."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from forge_harness.errors import UsageError
from forge_harness.model import BitLinear

_MODULE = "torchao.prototype.quantized_training"


def check() -> None:
    """Raises UsageError, with the remedy, where torchao or its BitNet training is not there."""
    _training()


def converted(model: nn.Module) -> nn.Module:
    """Returns a full-precision model, changed: its projections multiply as torchao trains BitNet.

    Int8 activations a token and ternary weights a tensor forward; backward a straight-through
    estimate in the dtype of the gradient (`torchao.prototype.quantized_training.bitnet`).

    Raises:
        UsageError: torchao is not there.
    """
    quantize: Any = import_module("torchao.quantization").quantize_
    training = _training()
    quantize(model, training(), filter_fn=lambda module, _name: isinstance(module, BitLinear))
    return model


def _training() -> Any:  # noqa: ANN401 - a class of a library without types
    try:
        return import_module(_MODULE).bitnet_training
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"torchao's BitNet training cannot be used ({error}); install a version that has "
            f"{_MODULE}.bitnet_training (pip install 'bitnet-forge-harness[peers]'), or leave "
            "--torchao out."
        ) from error
