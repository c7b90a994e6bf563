"""`BitLinear`: the linear layer whose forward uses ternary weights and int8 activations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.errors import unknown_choice
from forge_harness.quant import TernaryLinearOp
from forge_harness.quant.ternary import check_parts

from .norm import RMSNorm

Precision = Literal["ternary", "full"]
LinearFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x (..., K), latent weight (N, K), bias (N,) or None) -> (..., N)."""


class BitLinear(nn.Module):
    """A linear layer over a latent full-precision weight that is quantized at every forward.

    Training and evaluation mode compute the same. The bias is outside the scale and stays in full
    precision. With `precision="full"` the same parameters give the plain layer, norm included: the
    full-precision arm of a comparison, with the same state dict.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether there is a bias.
        sub_norm: Whether an RMSNorm stands in front of the quantization.
        parts: Row counts of the projections fused in the weight, one scale each; None: one scale.
        linear: The arithmetic; None: `TernaryLinearOp()`. Not part of the state dict, and shared,
            not copied, by `copy.deepcopy`.
        precision: "ternary" or "full".
        device: Where the parameters live.
        dtype: Of the parameters.

    Attributes:
        weight: Latent weight (N, K).
        bias: (N,) or None.
        norm: `RMSNorm` or None.

    Raises:
        ValueError: `parts` do not sum to N, or `precision` is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        sub_norm: bool = False,
        parts: Sequence[int] | None = None,
        linear: LinearFunction | None = None,
        precision: Precision = "ternary",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if precision not in ("ternary", "full"):
            raise ValueError(unknown_choice("precision", precision, ("ternary", "full")))
        if parts is not None:
            check_parts(parts, rows=out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.parts = None if parts is None else tuple(parts)
        self.precision: Precision = precision
        self.linear: LinearFunction = TernaryLinearOp() if linear is None else linear
        empty = partial(torch.empty, device=device, dtype=dtype)
        self.weight = nn.Parameter(empty(out_features, in_features))
        self.bias = nn.Parameter(empty(out_features)) if bias else None
        self.norm = RMSNorm(in_features, device=device, dtype=dtype) if sub_norm else None
        self.reset_parameters()

    def reset_parameters(self, gain: float = 1.0) -> None:
        """Draws the weight from N(0, gain**2 / in_features); zeroes the bias."""
        nn.init.normal_(self.weight, std=gain * max(self.in_features, 1) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features) in x's dtype."""
        if self.norm is not None:
            x = self.norm(x)
        if self.precision == "full":
            return F.linear(x, self.weight, self.bias)
        if self.parts is None:
            return self.linear(x, self.weight, self.bias)
        weights = torch.split(self.weight, list(self.parts))
        biases: Sequence[Tensor | None] = [None] * len(weights)
        if self.bias is not None:
            biases = torch.split(self.bias, list(self.parts))
        outputs = [self.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        return torch.cat(outputs, dim=-1)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """Returns the weight values (N, K) the forward multiplies with, without gradient.

        They come from the arithmetic's own `effective_weight`; one that has none is asked by its
        answer to the unit vectors, which adds the rounding of its activation quantizer.
        """
        if self.precision == "full":
            return self.weight.detach()
        weights = torch.split(self.weight, list(self.parts or (self.out_features,)))
        return torch.cat([self._effective(w) for w in weights])

    def _effective(self, weight: Tensor) -> Tensor:
        known = getattr(self.linear, "effective_weight", None)
        if known is not None:
            return cast(Tensor, known(weight))
        unit = torch.eye(self.in_features, dtype=weight.dtype, device=weight.device)
        return self.linear(unit, weight, None).t()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Asked here too, as a wrapper that hands on attributes (torch.compile) did not ask.
        if id(self) in memo:
            return cast(Self, memo[id(self)])
        # A bound method as `linear` would otherwise copy the object it belongs to as well.
        memo[id(self.linear)] = self.linear
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def extra_repr(self) -> str:
        """Shows shape, bias, parts and precision."""
        parts = "" if self.parts is None else f", parts={self.parts}"
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{parts}, "
            f"precision={self.precision}"
        )
