"""One optimizer update by its published formula, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .arrays import ArrayLike, Float64, float64


@dataclass(slots=True)
class AdamW:
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2) for one parameter.

    Attributes:
        betas: Decay rates of the two moments.
        eps: Added to the square root of the second moment.
        amsgrad: Whether the largest second moment so far counts (Reddi et al. 2018), as torch has
            it: the largest before its bias is corrected.
    """

    betas: tuple[float, float]
    eps: float
    amsgrad: bool = False
    _first: Float64 | float = field(default=0.0, init=False)
    _second: Float64 | float = field(default=0.0, init=False)
    _largest: Float64 | float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)

    def update(
        self, weight: ArrayLike, gradient: ArrayLike, learning_rate: float, weight_decay: float
    ) -> Float64:
        """Returns what the step adds to `weight`, and remembers the moments.

        Args:
            weight: The parameter before the step.
            gradient: As the optimizer sees it: clipped, accumulated.
            learning_rate: Of this step.
            weight_decay: Of this step.
        """
        slow, fast = self.betas
        g = float64(gradient)
        self._steps += 1
        self._first = slow * self._first + (1 - slow) * g
        self._second = fast * self._second + (1 - fast) * g**2
        mean = self._first / (1 - slow**self._steps)
        self._largest = np.maximum(self._largest, self._second)
        second = self._largest if self.amsgrad else self._second
        spread = np.sqrt(second / (1 - fast**self._steps))
        return np.asarray(
            -learning_rate * (weight_decay * float64(weight) + mean / (spread + self.eps))
        )
