"""How far gradients are from the oracle's, over what their arithmetic may be off by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from forge_harness import oracles
from forge_harness.evidence import smallest

from .support import roundoff


def excess(found: Tensor | None, expected: Any, terms: Any, length: int, extra: Any = 0.0) -> float:
    """Returns the largest error over its limit; infinite when there is no gradient at all.

    Args:
        found: The gradient.
        expected: The oracle's, float64.
        terms: Sum of |terms| of each element.
        length: Terms of each sum.
        extra: What each element may be off by besides.
    """
    if found is None:
        return math.inf
    # What is stored in bf16 is rounded once more, and once more where it came from.
    stored = 2 * (roundoff(found) - oracles.UNIT_ROUNDOFF)
    limit = (oracles.gradient_limit(length) + stored) * terms + extra + 1e-37
    return float(np.max(np.abs(oracles.float64(found) - expected) / limit))


def is_worse(error: float, worst: float) -> bool:
    """Whether an error is the worst so far: one that is no number is, and stays it."""
    return not (error <= worst or math.isnan(worst))


@dataclass(slots=True)
class _Sums:
    expected: Any = 0.0
    terms: Any = 0.0
    extra: Any = 0.0
    tokens: int = 0

    def add(self, expected: Any, terms: Any, tokens: int, extra: Any = 0.0) -> None:
        self.expected = self.expected + expected
        self.terms = self.terms + terms
        self.extra = self.extra + extra
        self.tokens += tokens

    def excess(self, found: Tensor | None) -> float:
        return excess(found, self.expected, self.terms, self.tokens, self.extra)


@dataclass(slots=True)
class WeightGradient:
    """What the calls of a layer should leave at its latent weight.

    In half precision (autocast) the operands of a product may be rounded first, or be exact.
    """

    name: str
    latent: nn.Parameter
    _exact: _Sums = field(default_factory=_Sums)
    _halves: _Sums = field(default_factory=_Sums)

    def add(self, gradient: Tensor, q: Tensor, s: Tensor, rounded: float) -> None:
        """Adds G^T . (q * s) of one call.

        Args:
            gradient: G (..., N).
            q: Codes (..., K).
            s: Scales (..., 1).
            rounded: Unit roundoff of the call's output.
        """
        upstream, x = oracles.float64(gradient), oracles.int64(q) * oracles.float64(s)
        terms, tokens = _product(np.abs(upstream), np.abs(x)), upstream.size // upstream.shape[-1]
        self._exact.add(oracles.weight_gradient(upstream, q, s), terms, tokens)
        if rounded <= oracles.UNIT_ROUNDOFF:
            self._halves.add(oracles.weight_gradient(upstream, q, s), terms, tokens)
            return
        narrow = oracles.narrowed(x, rounded)
        expected = _product(upstream, narrow.values)
        extra = _product(np.abs(upstream), narrow.slack) + 2 * rounded * np.abs(expected)
        self._halves.add(expected, terms, tokens, extra)

    def excess(self) -> float:
        """Returns the largest error of the gradient over its limit."""
        return smallest(sums.excess(self.latent.grad) for sums in (self._exact, self._halves))


def _product(upstream: Any, x: Any) -> Any:
    return upstream.reshape(-1, upstream.shape[-1]).T @ x.reshape(-1, x.shape[-1])
