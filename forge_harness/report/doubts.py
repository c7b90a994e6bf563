"""Checks that did not pass and whose values a section of the report shows outside of them."""

from __future__ import annotations

from collections.abc import Collection

from forge_harness.record import RunRecord
from forge_harness.report.anchors import check_anchor
from forge_harness.report.model import Doubt
from forge_harness.report.text import clean
from forge_harness.types import Outcome

_SOUND = (Outcome.PASS, Outcome.NOT_APPLICABLE)


def doubts(record: RunRecord, sources: Collection[str]) -> tuple[Doubt, ...]:
    """Returns those of some checks that are no pass: a value of theirs is not to be taken alone.

    Args:
        record: The run.
        sources: Ids of the checks whose values are shown.
    """
    return tuple(
        Doubt(
            check=check.id,
            anchor=check_anchor(check.id),
            outcome=check.outcome,
            reason=clean(check.reason),
        )
        for check in record.checks
        if check.id in sources and check.outcome not in _SOUND
    )
