"""The ten rules, as adapted, and the categories of the compliance table they are shown in."""

from __future__ import annotations

from collections.abc import Mapping

RULES: Mapping[int, str] = {
    1: "simple control flow: no recursion, no goto",
    2: "every loop has a bound that can be seen",
    3: "nothing grows without a bound after start-up",
    4: "no function over 60 lines",
    5: "two checks a function on average (functions over 5 lines)",
    6: "data live in the smallest scope",
    7: "results and errors are not dropped",
    8: "little preprocessor; in Python: no code made at run time",
    9: "few levels of reference; unsafe memory and pickles in named places only",
    10: "all warnings on, none left, none silenced without a reason",
}
CATEGORIES: Mapping[str, tuple[int, ...]] = {
    "Documentation": (4, 6, 8),
    "Testing coverage": (2, 5),
    "Error handling": (5, 7),
    "Performance": (1, 2, 3, 4),
    "Security": (1, 8, 9, 10),
    "Audit trails": (7, 10),
}
"""Requirement category of the specification -> the rules that bear on it."""
FUNCTION_LINES = 60
CHECKED_LINES = 5
CHECKS_A_FUNCTION = 2
CHAIN_LENGTH = 4
"""Names in `a.b.c.d`: three dereferences."""
