"""The Power of Ten, adapted to Python: ten rules as counts over a source tree.

The rules are G. J. Holzmann's for safety-critical C (IEEE Computer 39(6), 2006). Nobody certifies
Python against them; every figure here is of the adaptation in `rules`, with what it counted.
"""

from __future__ import annotations

from .assessment import Assessment, CategoryScore, RuleScore, Waiver, assess, load_waivers
from .documentation import Documentation, documentation

__all__ = [
    "Assessment",
    "CategoryScore",
    "Documentation",
    "RuleScore",
    "Waiver",
    "assess",
    "documentation",
    "load_waivers",
]
