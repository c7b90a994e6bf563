"""Root mean square normalisation, in fp32 whatever the input dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5
"""Added to the mean square; the value of the BitNet b1.58 configurations."""


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x**2) + eps) over the last dimension.

    Args:
        features: Size of the last dimension.
        eps: Added to the mean square.
        device: Where the weight lives.
        dtype: Of the weight.
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = NORM_EPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (..., features); the result has x's dtype."""
        # bf16 input with an fp32 weight falls off torch's fused path, so both go in as fp32.
        y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Shows size and eps."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
