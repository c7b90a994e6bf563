"""The verdict of a run, its reasons, and the exit codes they end with."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from forge_harness.errors import ExitCode
from forge_harness.record import CheckRecord, ItemRecord, RunRecord
from forge_harness.scoring.rollup import SEVERE
from forge_harness.scoring.score import SUITE_FLOOR, Score
from forge_harness.types import UNKNOWN_CHECK, Outcome, Severity, Verdict

PASSING_SCORE = 80
"""Lowest low score a passing verdict may have."""
READY_SCORE = 90
"""From here a run is ready; from PASSING_SCORE up to here, ready with notes."""
REQUIRED_COVERAGE = Fraction(9, 10)
"""Smallest share of the weight that must be measured."""
_LISTED = 5
MEASURED_BAD = (Outcome.FAIL, Outcome.ERROR, Outcome.XPASS)
"""Outcomes of a check that was measured and is not good, whatever its severity."""


def decide(
    checks: Sequence[CheckRecord],
    unscored: Sequence[ItemRecord],
    score: Score,
    *,
    is_selection: bool,
    state: str,
    state_reason: str = "",
    problems: Sequence[str] = (),
) -> tuple[Verdict, list[str]]:
    """Returns the verdict and its reasons, the ones that matter most first.

    Args:
        checks: Every check in scope.
        unscored: Items the score cannot place; each blocks, or hides checks, which is incomplete.
        score: The score of `checks`.
        is_selection: Whether only a part of the profile was asked for.
        state: State of the run; only a finished one can pass.
        state_reason: Why the run did not finish.
        problems: Sentences that lower PASS to PASS_WITH_WARNINGS.
    """
    blocking = blocking_reasons(checks, unscored)
    # Of no weight in the verdict, but a selection fails for them: they are named with any verdict.
    also = [*_milder_reasons(checks), *problems]
    if blocking:
        return Verdict.FAIL, [*blocking, *also]
    open_ends = _incomplete_reasons(checks, unscored, score)
    is_whole = state == "finished" and not open_ends
    if not (is_whole or is_selection) and (hopeless := _low_reasons(score, at_best=True)):
        return Verdict.FAIL, [*hopeless, *open_ends, *also]
    if state != "finished":
        detail = f": {state_reason}" if state_reason else ""
        return Verdict.INCOMPLETE, [f"the run is {state}{detail}", *open_ends, *also]
    if is_selection:
        return Verdict.PARTIAL, ["only a selection ran", *open_ends, *also]
    if open_ends:
        return Verdict.INCOMPLETE, [*open_ends, *also]
    low = _low_reasons(score)
    if low:
        return Verdict.FAIL, [*low, *also]
    notes = [*_notes(checks, score), *problems]
    return (Verdict.PASS_WITH_WARNINGS if notes else Verdict.PASS), notes


def blocking_reasons(checks: Sequence[CheckRecord], unscored: Sequence[ItemRecord]) -> list[str]:
    """Returns one sentence a measured violation that blocks, by severity, in catalogue order."""
    order = list(Severity)
    found = [(order.index(check.severity), _blocks(check)) for check in checks]
    sentences = [sentence for _, sentence in sorted(found, key=lambda f: f[0]) if sentence]
    return sentences + [_unplaced(item) for item in unscored if not item.hides_checks]


def _milder_reasons(checks: Sequence[CheckRecord]) -> list[str]:
    """Returns which checks that do not block failed or could not run, by severity."""
    reasons = []
    for severity in (severity for severity in Severity if severity not in SEVERE):
        for outcome, word in ((Outcome.FAIL, "failed"), (Outcome.ERROR, "could not run")):
            ids = [c.id for c in checks if c.severity is severity and c.outcome is outcome]
            if ids:
                reasons.append(_counted(ids, f"{severity} check", word))
    return reasons


def _unplaced(item: ItemRecord) -> str:
    if item.check == UNKNOWN_CHECK and item.reason:
        return f"{item.nodeid} belongs to no check: {item.reason}"
    return (
        f"{item.nodeid} belongs to check {item.check!r}, which is not in the catalogue's scope of"
        " this run; collected checks and catalogue must match"
    )


def _blocks(check: CheckRecord) -> str | None:
    name = f"{check.severity} check {check.id}"
    if check.outcome is Outcome.XPASS:
        return f"{name} {check.reason}"
    if check.severity in SEVERE and check.outcome is Outcome.FAIL:
        return f"{name} failed: {check.reason}"
    if check.severity in SEVERE and check.outcome is Outcome.ERROR:
        return f"{name} could not run: {check.reason}"
    waived = check.outcome in (Outcome.XFAIL, Outcome.NOT_APPLICABLE)
    flaky = any(item.outcome is Outcome.FLAKY for item in check.items)
    if check.severity is Severity.CRITICAL and flaky and not waived:
        return f"{name} is flaky: {check.reason}"
    return None


def _incomplete_reasons(
    checks: Sequence[CheckRecord], unscored: Sequence[ItemRecord], score: Score
) -> list[str]:
    # As a critical check that is not measured: it may hold one.
    reasons = [
        f"{item.nodeid} holds unknown checks, not measured: {item.reason}"
        for item in unscored
        if item.hides_checks
    ]
    for severity in (Severity.CRITICAL, Severity.HIGH):
        missing = [
            check.id
            for check in checks
            if check.severity is severity and check.outcome is Outcome.NOT_MEASURED
        ]
        if missing:
            reasons.append(_counted(missing, f"{severity} check", "not measured"))
    if score.coverage < REQUIRED_COVERAGE:
        reasons.append(
            f"{_percent(score.coverage)} of the weight is measured, "
            f"{_percent(REQUIRED_COVERAGE)} is required"
        )
    return reasons


def _low_reasons(score: Score, *, at_best: bool = False) -> list[str]:
    """Returns what is too low, or (`at_best`) stays so whatever the missing checks come to."""
    words = "at most " if at_best else ""
    # Without caps: one that a missing check imposes goes with its measurement.
    reached = int(score.uncapped_high) if at_best else score.low
    reasons = []
    if reached < PASSING_SCORE and any(suite.applicable for suite in score.suites):
        reasons.append(f"the score is {words}{reached}, under {PASSING_SCORE}")
    for suite in score.suites:
        share = suite.high if at_best else suite.low
        if suite.applicable and share < SUITE_FLOOR:
            at = words or "at "
            reasons.append(f"suite {suite.name} is {at}{int(share)}, under {SUITE_FLOOR}")
    return reasons


def _notes(checks: Sequence[CheckRecord], score: Score) -> list[str]:
    words = {
        Outcome.FAIL: "failed",
        Outcome.ERROR: "could not run",
        Outcome.WARN: "warned",
        Outcome.FLAKY: "flaky",
        Outcome.XFAIL: "waived",
        Outcome.NOT_MEASURED: "not measured",
    }
    notes = []
    for outcome, word in words.items():
        ids = [check.id for check in checks if check.outcome is outcome]
        if ids:
            notes.append(_counted(ids, "check", word))
    if score.low < READY_SCORE:
        notes.append(f"the score is {score.low}, under {READY_SCORE}")
    return notes


def _counted(ids: Sequence[str], noun: str, state: str) -> str:
    verb = (
        ""
        if state in ("failed", "could not run", "warned")
        else ("is " if len(ids) == 1 else "are ")
    )
    plural = noun if len(ids) == 1 else f"{noun}s"
    more = f" and {len(ids) - _LISTED} more" if len(ids) > _LISTED else ""
    return f"{len(ids)} {plural} {verb}{state}: {', '.join(ids[:_LISTED])}{more}"


def _percent(share: Fraction) -> str:
    """Floors to a whole percent: 89.99 % is not 90 %."""
    return f"{int(share * 100)} %"


def exit_code_for(record: RunRecord) -> ExitCode:
    """Returns the exit code of the command that made the run (`run`, pytest).

    A selection ends with 0 when all of it was measured, no module that may hold more of it skipped
    itself, and nothing in it failed; waived failures, warnings and checks that passed at a second
    attempt count as in a whole run.
    """
    if record.state == "interrupted":
        return ExitCode.INTERRUPTED
    if record.verdict is Verdict.PARTIAL and _selection_is_good(record):
        return ExitCode.PASS
    return gate_exit_code(record)


def gate_exit_code(record: RunRecord) -> ExitCode:
    """Returns the exit code of `gate`, for which a selection is never a release.

    A selection in which something failed, of whatever severity, has failed: its verdict does not
    weigh it against the rest of the run.
    """
    if record.verdict is Verdict.FAIL:
        return ExitCode.GATE_FAILED
    if record.verdict is Verdict.PARTIAL and any(c.outcome in MEASURED_BAD for c in record.checks):
        return ExitCode.GATE_FAILED
    if record.state == "finished" and record.verdict in (
        Verdict.PASS,
        Verdict.PASS_WITH_WARNINGS,
    ):
        return ExitCode.PASS
    return ExitCode.INCOMPLETE


def _selection_is_good(record: RunRecord) -> bool:
    if record.unscored_items:
        return False
    outcomes = [c.outcome for c in record.checks if c.outcome is not Outcome.NOT_APPLICABLE]
    bad = (*MEASURED_BAD, Outcome.NOT_MEASURED)
    return bool(outcomes) and not any(outcome in bad for outcome in outcomes)
