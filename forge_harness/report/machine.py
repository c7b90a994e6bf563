"""What the formats that other programs read share: how a run ended, times, files, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from forge_harness.report.model import CheckRow, Report
from forge_harness.report.text import clean
from forge_harness.scoring.rollup import SEVERE
from forge_harness.scoring.verdict import MEASURED_BAD
from forge_harness.types import Outcome, Severity, Verdict

TOOL = "forge-harness"
VERDICT_ID = "run.verdict"
"""Name of the entry that says how the run ended where no check says it."""
UNSCORED_MESSAGE = "belongs to no check in scope; collected checks and catalogue must match"
_PACKAGE = "packages.bitnet-forge-harness"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def ends_well(report: Report) -> bool:
    """Returns whether the command that made the run ends with 0.

    A selection does when all of it was measured and nothing failed; its verdict is PARTIAL in
    either case, so that the verdict alone does not tell.
    """
    outcomes = [check.outcome for check in report.checks]
    unplaced = bool(report.unscored or report.uncollected)
    return ended_well(report.headline.verdict, outcomes, unplaced=unplaced)


def ended_well(verdict: Verdict, outcomes: Iterable[Outcome], *, unplaced: bool) -> bool:
    """Returns whether a run of this verdict and these outcomes ends with 0; see `ends_well`.

    Args:
        verdict: Of the run.
        outcomes: Of its checks.
        unplaced: Whether some of its items or modules belong to no check.
    """
    if verdict is not Verdict.PARTIAL:
        return verdict in (Verdict.PASS, Verdict.PASS_WITH_WARNINGS)
    applicable = {*outcomes} - {Outcome.NOT_APPLICABLE}
    bad = {*MEASURED_BAD, Outcome.NOT_MEASURED}
    return bool(applicable) and not (applicable & bad or unplaced)


def fails_gate(check: CheckRow, report: Report) -> bool:
    """Returns whether a check alone makes `gate` fail; of a selection, any failure does."""
    if check.outcome is Outcome.XPASS:
        return True
    if check.outcome in MEASURED_BAD:
        return check.severity in SEVERE or report.headline.verdict is Verdict.PARTIAL
    # Flaky items may be under a check that shows something worse, or is waived.
    is_out = check.outcome in (Outcome.XFAIL, Outcome.NOT_APPLICABLE)
    flaky = any(item.outcome is Outcome.FLAKY for item in check.items)
    return check.severity is Severity.CRITICAL and flaky and not is_out


def verdict_message(report: Report) -> str:
    """Returns the verdict and every reason for it, in one line."""
    reasons = ["".join(span.text for span in reason) for reason in report.reasons]
    return f"{report.headline.verdict}: {'; '.join(reasons) or report.headline.meaning}"


def tool_version(report: Report) -> str | None:
    """Returns the version of the harness that measured, not of the one that writes."""
    return dict(report.execution.environment).get(_PACKAGE)


def file_of(nodeid: str) -> str:
    """Returns the file of a pytest item, relative to its suites."""
    return nodeid.partition("::")[0]


def moment(text: str | None) -> datetime | None:
    """Returns a time of the record; None when it has none that can be read."""
    try:
        found = datetime.fromisoformat(text or "")
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def epoch_ms(text: str | None) -> int | None:
    """Returns a time of the record in milliseconds since 1970."""
    found = moment(text)
    return None if found is None else (found - _EPOCH) // timedelta(milliseconds=1)


def json_text(document: Any) -> str:  # noqa: ANN401
    """Returns a document as JSON that every reader takes.

    A lone surrogate cannot be encoded, and a control character is refused by some readers even
    when it is escaped; both are spelled out, as everywhere in the reports.
    """
    return json.dumps(_cleaned(document), ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def _cleaned(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, str):
        return clean(value, lines=True)
    if isinstance(value, dict):
        return {clean(key): _cleaned(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(part) for part in value]
    return value
