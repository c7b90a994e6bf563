"""Angles of positions, where the model takes their cosine and sine.

A rotary or sinusoidal embedding turns by position times frequency. Angles grow with the position,
and with them the error of their rounding: bf16 at position 128 knows whole radians only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forge_harness import oracles

from .support import Worst

LEAST_ROWS = 8
"""Positions from which on a table is taken to be one of angles."""
ALIKE = 2.0**-6
"""Share of the largest angle within which a table must be one of multiples to be one of positions:
four times what bf16 makes of multiples, and nothing that is not linear in the position."""
_OF_ANGLES = {
    torch.ops.aten.cos.default: 0,
    torch.ops.aten.sin.default: 0,
    torch.ops.aten.polar.default: 1,
}
"""Operations on angles, and which of their arguments holds them."""


class Angles(TorchDispatchMode):
    """Compares what cosines and sines are taken of, within the block, with float64 multiples.

    Attributes:
        error: The largest deviation from a multiple of the frequency, over the largest angle.
    """

    def __init__(self) -> None:
        super().__init__()
        self.error = Worst()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Looks at the angles; does all as asked."""
        if func in _OF_ANGLES and len(args) > _OF_ANGLES[func]:
            self._see(str(func), args[_OF_ANGLES[func]])
        return func(*args, **(kwargs or {}))

    def _see(self, name: str, angles: Tensor) -> None:
        if type(angles) is not Tensor or angles.device.type == "meta":
            return
        while angles.dim() > 2:
            angles = angles[0]
        if angles.dim() < 2:
            return
        table = oracles.float64(angles)
        for rows in (table, table.T):
            found = _deviation(rows)
            if found is not None:
                self.error.see(f"{name} of {angles.dtype} {tuple(angles.shape)}", found)


def _deviation(rows: np.ndarray) -> float | None:
    """How far rows are from first + t * frequency, over the largest; None for another table."""
    if len(rows) < LEAST_ROWS or not np.all(np.isfinite(rows)):
        return None
    turned = rows - rows[0]
    largest = float(np.max(np.abs(turned)))
    if largest < 1.0:
        return None  # not one radian from end to end: nothing that rounding could spoil
    positions = np.arange(len(rows))[:, None] / (len(rows) - 1)
    off = float(np.max(np.abs(turned - positions * turned[-1]))) / largest
    return off if off <= ALIKE else None
