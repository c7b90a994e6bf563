"""Binary weights of the first BitNet (arXiv 2310.11453): the one-bit ancestor of b1.58."""

from __future__ import annotations

import torch
from torch import Tensor

from .ternary import EPS, _float32_matrix


def binary_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes a weight to -1, +1 times one scale.

    codes = Sign(w - mean w) with Sign(0) = -1 (so not `torch.sign`), scale = max(mean |w|, EPS)
    of the uncentred weight. A NaN or an infinity makes the scale non-finite, as in `ternary`.

    Args:
        w: Weight (N, K), any floating dtype.

    Returns:
        codes: int8 (N, K).
        scale: fp32, 0-d.

    Raises:
        ValueError: `w` is not 2-D.
        TypeError: `w` is not floating.
    """
    weight = _float32_matrix(w)
    count = max(weight.numel(), 1)
    centre = weight.sum(dim=1).sum() / count
    scale = (weight.abs().sum(dim=1).sum() / count).clamp(min=EPS)
    return (weight > centre).to(torch.int8) * 2 - 1, scale
