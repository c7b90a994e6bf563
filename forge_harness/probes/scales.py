"""What a weight quantizer gives back, in the shapes that independent references compute with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forge_harness.errors import SubjectError


def quantized_weight(
    subject: Any,  # noqa: ANN401 - any object is a subject
    weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns a subject's codes of a weight (N, K), and its scales: (1,), or one a row (N,).

    Raises:
        SubjectError: There are more or fewer scales than that. What is computed with two of them
            (a value for each sign) or with groups of columns has no reference here.
    """
    codes, scale = subject.quantize_weight(weight)
    scales = torch.as_tensor(scale).reshape(-1)
    if scales.numel() not in (1, len(weight)):
        raise SubjectError(
            f"quantize_weight gave {scales.numel()} scales for a weight {tuple(weight.shape)}; "
            "expected one, or one a row: scales of groups of columns or of signs have no oracle, "
            "leave Quantizes out and its checks are not measured"
        )
    return codes, scales
