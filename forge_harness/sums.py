"""Sums of float64 that every Python adds up to the same bits."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import reduce


def sum_in_order(values: Iterable[float]) -> float:
    """Returns the sum from left to right, rounded after each addition.

    From Python 3.12 on `sum` carries the roundoff along (gh-100425), before that it does not: a
    run that one wrote would not be recomputed by the other.
    """
    return reduce(operator.add, values, 0.0)
