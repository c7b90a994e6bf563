"""The end of `run` and the whole of `gate`: verdict, score, suites, what blocks, in plain text."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from forge_harness.cli.terminal import coloured, printable, several, shown, table
from forge_harness.errors import ExitCode
from forge_harness.policy import Policy
from forge_harness.record import CheckRecord, RunRecord, ScoreRecord, SuiteRecord
from forge_harness.types import Outcome, Severity

MEANINGS = {
    ExitCode.PASS: "pass",
    ExitCode.GATE_FAILED: "gate failed",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.INTERNAL_ERROR: "internal error",
    ExitCode.USAGE: "usage or configuration error",
    ExitCode.NOTHING_COLLECTED: "nothing collected",
    ExitCode.INCOMPLETE: "incomplete: required evidence is missing",
    ExitCode.VERIFICATION_FAILED: "verification failed",
    ExitCode.BASELINE_MISSING: "baseline missing or not comparable",
}
_REASONS_SHOWN = 5
_COLUMNS = (
    ("pass", (Outcome.PASS,)),
    ("warn", (Outcome.WARN, Outcome.FLAKY)),
    ("fail", (Outcome.FAIL, Outcome.XPASS)),
    ("error", (Outcome.ERROR,)),
    ("waived", (Outcome.XFAIL,)),
    ("not measured", (Outcome.NOT_MEASURED,)),
    ("n/a", (Outcome.NOT_APPLICABLE,)),
)


class Scored(Protocol):
    """What has a score: a run, or what was kept of one."""

    @property
    def score(self) -> ScoreRecord:
        """The interval."""
        ...

    @property
    def coverage(self) -> float:
        """Share that was measured."""
        ...


def score_sentence(record: Scored) -> str:
    """Returns "Integration score 83 (at most 91), 92 % measured"."""
    return (
        f"Integration score {record.score.low} (at most {record.score.high}), "
        f"{percent(record.coverage)} measured"
    )


def scope_sentence(record: RunRecord) -> str:
    """Returns "quick scope: 118 of 147 checks", with the selection where there is one."""
    scope = record.scope
    named = f" ({scope.part})" if scope.part else ""
    return f"{scope.profile} scope: {scope.in_scope} of {scope.total} checks{named}"


def percent(share: float) -> str:
    """Returns a share in whole percent, floored: 89.9 % is not 90 %."""
    # Coverage has four digits; the addend undoes their binary error (0.29 * 100 is 28.99...).
    return f"{int(share * 100 + 1e-9)} %"


def verdict_lines(record: RunRecord) -> list[str]:
    """Returns verdict, score and the reasons, at most five; each is one line."""
    reasons = record.verdict_reasons[:_REASONS_SHOWN]
    more = len(record.verdict_reasons) - len(reasons)
    return [
        f"{coloured(record.verdict)}, {scope_sentence(record)}",
        score_sentence(record),
        # What a test said may be a stranger's: it must not end the line or move the cursor.
        *(f"  - {printable(reason)}" for reason in reasons),
        *([f"  - and {more} more"] if more else []),
    ]


def summary(
    record: RunRecord, policy: Policy, directory: Path, written: Sequence[Path], code: ExitCode
) -> str:
    """Returns what `run` prints at its end."""
    from forge_harness.scoring import policy_line

    lines = ["", *verdict_lines(record), "", suite_table(record.suites), ""]
    lines += not_measured_lines(record)
    lines += timed_out_lines(record)
    lines += python_warning_lines(record)
    page = next((path for path in written if path.suffix == ".html"), None)
    lines.append(f"Report: {shown(page)}" if page else f"Run: {shown(directory)}")
    if not written:
        again = f"forge-harness report {shlex.quote(shown(directory))}"
        lines.append(f"No space was left for the reports: free some, and `{again}` makes them.")
    lines.append(printable(policy_line(policy)))
    lines.append(f"Exit code {int(code)}: {MEANINGS[code]}.")
    return "\n".join(lines)


def timed_out_lines(record: RunRecord) -> list[str]:
    """Returns how many checks did not end in their time and what helps; nothing where all did."""
    late = sum(check.reason.startswith("timed out after") for check in record.checks)
    if not late:
        return []
    return [
        f"Timed out: {several(late, 'check')}. --timeout SECONDS gives each more time; a smaller "
        "model as the subject's first task takes less."
    ]


def suite_table(suites: Sequence[SuiteRecord]) -> str:
    """Returns one row a suite: weight, score, coverage, counts by outcome, time."""
    shown = [
        (name, outcomes)
        for name, outcomes in _COLUMNS
        if any(suite.counts.get(outcome) for suite in suites for outcome in outcomes)
    ]
    headers = ("suite", "weight", "score", "measured", *(name for name, _ in shown), "time")
    rows = [
        (
            suite.name,
            suite.weight,
            *_score_and_measured(suite),
            *(sum(suite.counts.get(o, 0) for o in outcomes) or "" for _, outcomes in shown),
            f"{suite.duration_s:.1f} s",
        )
        for suite in suites
    ]
    return table(headers, rows)


def _score_and_measured(suite: SuiteRecord) -> tuple[str, str]:
    """Returns the two cells; of a suite without a check that applies, neither is a number."""
    if not sum(suite.counts.values()) - suite.counts.get(Outcome.NOT_APPLICABLE, 0):
        return "n/a", "n/a"
    score = str(suite.low) if suite.low == suite.high else f"{suite.low}-{suite.high}"
    return score, percent(suite.coverage)


def python_warning_lines(record: RunRecord) -> list[str]:
    """Returns in how many checks Python warned, and the first warning; nothing where none did."""
    given = [w for w in (_warnings(check) for check in record.checks) if w]
    if not given:
        return []
    where = several(len(given), "check")
    return [f"Python warnings in {where}, kept with them; the first: {printable(given[0][0])}"]


def _warnings(check: CheckRecord) -> list[str]:
    return [warning for item in check.items for warning in item.warnings]


def not_measured_lines(record: RunRecord) -> list[str]:
    """Returns how many checks were not measured, by severity; nothing when all were."""
    missing = Counter(c.severity for c in record.checks if c.outcome is Outcome.NOT_MEASURED)
    if not missing:
        return []
    parts = [f"{missing[severity]} {severity}" for severity in Severity if missing[severity]]
    noun = "check" if missing.total() == 1 else "checks"
    return [f"Not measured: {missing.total()} {noun} ({', '.join(parts)})."]
