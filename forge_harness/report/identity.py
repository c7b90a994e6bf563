"""Names of documents that are the same whenever the run is: no clock, no chance."""

from __future__ import annotations

import json
import uuid

from forge_harness.report.model import Report
from forge_harness.report.text import clean

_SPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "forge-harness.run")


def run_guid(run_id: str) -> str:
    """Returns the UUID of a run, and of a report of it that speaks of no other run."""
    return str(uuid.uuid5(_SPACE, clean(run_id)))


def report_guid(report: Report) -> str:
    """Returns the UUID of a report: another one for each baseline and trend it speaks of."""
    if report.changes.baseline is None and report.trend is None:
        return run_guid(report.run_id)
    points = () if report.trend is None else report.trend.points
    others = [report.changes.baseline, *(f"{point.run_id} {point.digest}" for point in points)]
    return run_guid(json.dumps([report.run_id, others]))
