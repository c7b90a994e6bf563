"""Answers of the packed model against the trained one, over the shapes that inputs come in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from forge_harness.evidence import largest
from forge_harness.probes.outputs import tensors_of

from .rounding import ALLOWED, roundings

SIZES = (1, 2, 4, 17, 64)
"""Rows of a batch: kernels have a path for one, for few, for what fills no block, and for many."""
LENGTHS = (1, 2, 7)
"""Tokens of a prefix, besides all but one: decoding gives one at a time."""
SAME = 1e-3
"""Of logits: less is another order of sums."""
CODE = 1 / 127
"""A step of an activation's code: what sums in another order may flip, and of one input of many.
The limit is higher where such flips move the trained model's own answers further."""


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
    spec = subject.model_spec(task)
    with torch.inference_mode():
        expected = logits_of(trained(inputs))
        if not expected.any():
            evidence.record(
                f"{task}.difference_by_shape",
                "not compared: every logit of a fresh model is 0",
                reason="an output layer that begins at zero shows nothing of what is in front",
            )
            return
        with roundings(trained, spec.quantized, seed=seed):
            noise = _rows(logits_of(trained(inputs)), expected)
        for given in _given(inputs, spec.causal):
            answers = packed(given), logits_of(trained(given))
            differences[tuple(given.shape)] = _rows(*answers)
    _hold(evidence, task, differences, noise)


def _hold(evidence: Any, task: str, differences: Mapping[Any, Tensor], noise: Tensor) -> None:
    limit = largest((CODE, ALLOWED * float(noise.max())))
    wrong = [shape for shape, rows in differences.items() if not rows.max() <= limit]
    evidence.at_most(
        f"{task}.difference_by_shape",
        largest(float(rows.max()) for rows in differences.values()),
        limit=limit,
        reason=f"largest of {len(differences)} shapes of inputs: a row of the packed model's "
        "logits against the trained model's, over their norm, of which roundings of its inputs "
        f"move {float(noise.max()):.2g}; over it: {wrong or 'none'}",
    )
    evidence.at_most(
        f"{task}.typical_difference",
        float(torch.cat(list(differences.values())).median()),
        limit=largest((SAME, ALLOWED * float(noise.median()))),
        reason="median of those rows, of which such roundings move "
        f"{float(noise.median()):.2g}: codes flip in few, other scales show in all",
    )


def logits_of(answer: Any) -> Tensor:
    """Returns the logits of a trained model's answer: itself, or the first tensor of rows in it.

    What `BuildsModel.build_model` answers with is a matter between it and its loss.
    """
    if isinstance(answer, Tensor):
        return answer
    rows = [each for each in tensors_of(answer) if each.dim() > 1]
    return rows[0]


def _given(inputs: Tensor, sequences: bool) -> Iterator[Tensor]:
    for size in SIZES:
        yield inputs[:size]
    if sequences and inputs.dim() > 1:
        for length in (*LENGTHS, inputs.shape[1] - 1):
            for size in SIZES[::2]:
                yield inputs[:size, :length]


def _rows(found: Tensor, expected: Tensor) -> Tensor:
    """Differences of all rows of logits, by the norms of those expected."""
    if found.shape != expected.shape:
        return torch.tensor([torch.inf])
    distance = torch.linalg.vector_norm(found.double() - expected.double(), dim=-1)
    share = distance / torch.linalg.vector_norm(expected.double(), dim=-1)
    # A row of zeros has no norm, and is what it should be.
    return share.masked_fill(distance == 0, 0).flatten()
