"""Numbers that count something: whole, and within what torch takes."""

from __future__ import annotations

import operator
from typing import SupportsIndex, cast


def check_whole(**numbers: object) -> None:
    """Raises unless every number that is given, by its name, is an integer of 64 bits.

    Raises:
        TypeError: One is no integer.
        ValueError: One has more bits.
    """
    for name, number in numbers.items():
        try:
            whole = operator.index(cast("SupportsIndex", number))
        except TypeError:
            raise TypeError(f"{name} {number!r}; expected an integer.") from None
        if not -(2**63) <= whole < 2**63:
            raise ValueError(f"{name} {whole}; expected -2**63 to 2**63 - 1: take a smaller one.")
