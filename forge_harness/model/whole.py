"""Numbers that count something: whole, and within what torch takes."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
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


def check_sizes(most: Mapping[str, int] | None = None, **numbers: object) -> None:
    """Raises unless every number is a whole one that a size of a model can be.

    Args:
        most: Largest value of those that have one.
        numbers: By their names.

    Raises:
        TypeError: One is no integer.
        ValueError: One is below 1, or over its largest value.
    """
    check_whole(**numbers)
    for name, number in numbers.items():
        largest = (most or {}).get(name, 2**31 - 1)
        if not 1 <= operator.index(cast("SupportsIndex", number)) <= largest:
            raise ValueError(f"{name} {number}; expected 1 to {largest}.")


def check_finite_number(**numbers: object) -> None:
    """Raises ValueError unless every number, by its name, is positive and finite."""
    for name, number in numbers.items():
        if not isinstance(number, int | float) or not 0 < number < math.inf:
            raise ValueError(f"{name} {number!r}; expected a positive finite number.")
