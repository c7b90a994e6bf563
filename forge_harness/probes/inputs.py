"""What a quantized layer makes its activation codes of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def prepares_inputs(subject: Any) -> bool:  # noqa: ANN401 - any object is a subject
    """Returns whether a subject says what its layers do to their inputs first."""
    return callable(getattr(subject, "quantized_input", None))


def quantized_input(
    subject: Any,  # noqa: ANN401 - as above
    model: nn.Module,
    name: str,
    x: Tensor,
) -> Tensor:
    """Returns what the layer `name` makes codes of, given its input.

    The input itself, but for a subject whose layers normalise or rotate it in their own forward,
    where no module's output shows the result. It says so by a method
    `quantized_input(model, name, x)`, differentiable in `x`: the RMSNorm without gains of
    Microsoft's BitLinear ("The Era of 1-bit LLMs: Training Tips, Code and FAQ", 2024), say, or the
    Hadamard transform of BitNet v2.

    Args:
        subject: The subject.
        model: A model of its `build_model`.
        name: Of a quantized module.
        x: What the module is called with, (..., K).

    Returns:
        (..., K), floating.
    """
    return subject.quantized_input(model, name, x) if prepares_inputs(subject) else x
