"""Answers of the packed model against the trained one, over the shapes that inputs come in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from forge_harness.evidence import largest

SIZES = (1, 2, 4, 17, 64)
"""Rows of a batch: kernels have a path for one, for few, for what fills no block, and for many."""
LENGTHS = (1, 2, 7)
"""Tokens of a prefix, besides all but one: decoding gives one at a time."""
CODE = 1 / 127
"""A step of an activation's code: what sums in another order may flip, and of one input of many."""


def hold_shapes(evidence: Any, subject: Any, task: str, *, seed: int) -> None:
    """Holds the packed model of a task to the trained one for each size and length.

    Args:
        evidence: Of the check.
        subject: Builds both models.
        task: Of the subject.
        seed: Of model and inputs.
    """
    trained = subject.build_model(task, seed=seed).eval()
    packed = subject.inference_model(task, "packed", seed=seed)
    inputs = subject.example_batch(task, batch_size=max(SIZES), seed=seed + 2).inputs
    differences = {}
    with torch.inference_mode():
        if not logits_of(trained(inputs)).any():
            evidence.record(
                f"{task}.difference_by_shape",
                "not compared: every logit of a fresh model is 0",
                reason="an output layer that begins at zero shows nothing of what is in front",
            )
            return
    with torch.inference_mode():
        for given in _given(inputs, subject.model_spec(task).causal):
            answers = packed(given), logits_of(trained(given))
            differences[tuple(given.shape)] = _difference(*answers)
    wrong = [shape for shape, difference in differences.items() if not difference <= CODE]
    evidence.at_most(
        f"{task}.difference_by_shape",
        largest(differences.values()),
        limit=CODE,
        reason=f"largest of {len(differences)} shapes of inputs: a row of the packed model's "
        f"logits against the trained model's, over their norm; over it: {wrong or 'none'}",
    )


def logits_of(answer: Any) -> Tensor:
    """Returns the logits of a trained model's answer: itself, or the first tensor of rows in it.

    What `BuildsModel.build_model` answers with is a matter between it and its loss.
    """
    if isinstance(answer, Tensor):
        return answer
    entries = answer.values() if isinstance(answer, Mapping) else answer
    return next(entry for entry in entries if isinstance(entry, Tensor) and entry.dim() > 1)


def _given(inputs: Tensor, sequences: bool) -> Iterator[Tensor]:
    for size in SIZES:
        yield inputs[:size]
    if sequences and inputs.dim() > 1:
        for length in (*LENGTHS, inputs.shape[1] - 1):
            for size in SIZES[::2]:
                yield inputs[:size, :length]


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest over all rows of logits, by their norms."""
    if found.shape != expected.shape:
        return float("inf")
    distance = torch.linalg.vector_norm(found.double() - expected.double(), dim=-1)
    return float((distance / torch.linalg.vector_norm(expected.double(), dim=-1)).max())
