"""Names of places in the HTML report: one for each suite, check and row of evidence.

They follow from ids and positions in the record, so a link stays good in the next report.
"""

from __future__ import annotations

import re

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")


def slug(text: str) -> str:
    """Returns text as part of an HTML id.

    Other characters become `~` and their code point, `~` included, so that two texts never
    share a slug.
    """
    return _UNSAFE.sub(lambda match: f"~{ord(match[0]):x}", text)


def suite_anchor(name: str) -> str:
    """Returns the anchor of a suite."""
    return f"suite-{slug(name)}"


def check_anchor(check_id: str) -> str:
    """Returns the anchor of a check."""
    return f"check-{slug(check_id)}"


def evidence_anchor(check_id: str, index: int) -> str:
    """Returns the anchor of the `index`-th evidence of a check, counted from 0."""
    return f"e-{slug(check_id)}-{index + 1}"
