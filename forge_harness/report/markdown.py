"""Markdown for a GitHub step summary: what a reviewer needs before they open the HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from forge_harness.report.changes import SIDES
from forge_harness.report.model import (
    Change,
    CheckRow,
    Doubt,
    Figure,
    Report,
    ScoreRow,
    Sentence,
    TrendPoint,
    Uncompared,
)
from forge_harness.report.text import duration, percent, shorten
from forge_harness.scoring import LISTED_CHANGES
from forge_harness.types import Outcome, Verdict

MAX_BYTES = 900_000
"""GitHub refuses a step summary over 1 MiB, all steps of a job together being shown cut."""
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$@:-]|(?<=www)\.)")
_MARKS = {
    Verdict.PASS: "\u2705",
    Verdict.PASS_WITH_WARNINGS: "\u26a0\ufe0f",
    Verdict.INCOMPLETE: "\u2753",
    Verdict.FAIL: "\u274c",
    Verdict.PARTIAL: "\u2753",
}
_TREND = (
    *("started", "run", "commit", "profile", "verdict"),
    *("score", "measured", "failed", "not measured"),
)
_BAD = (Outcome.FAIL, Outcome.ERROR, Outcome.XPASS)
_HALF_GREEN = (Outcome.WARN, Outcome.FLAKY, Outcome.XFAIL)
_SHOWN_REASONS = 5
_SHOWN_CHANGES = 100
_SHOWN_CHECKS = 100
_REASON_LENGTH = 300
_CUT = "\n\n*Cut here; the HTML report has all of it.*\n"


def render_markdown(report: Report) -> str:
    """Returns the report in brief, under `MAX_BYTES` of UTF-8."""
    blocks = [
        _head(report),
        _reasons(report.reasons),
        _changes(report),
        _trend(report),
        _scores("Suites", "suite", report.suites),
        _checks("What failed", report.checks, _BAD),
        _checks("What was not measured", report.checks, (Outcome.NOT_MEASURED,)),
        _checks("What warned, was flaky or is waived", report.checks, _HALF_GREEN),
        _quality(report),
        _load(report),
        _scores("Components", "component", report.components),
        _end(report),
    ]
    text = "\n\n".join(block for block in blocks if block) + "\n"
    data = text.encode()
    if len(data) <= MAX_BYTES:
        return text
    kept = data[: MAX_BYTES - len(_CUT.encode())].decode(errors="ignore")
    return kept.rpartition("\n")[0] + _CUT


def escape(text: str) -> str:
    """Returns text that Markdown and GitHub show as it is: no markup, links, mentions or HTML."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # A backslash does not stop GitHub from linking @names and addresses ("www." begins one); an
    # entity does.
    return _SPECIAL.sub(_escaped, plain).replace("\n", " ")


def _escaped(match: re.Match[str]) -> str:
    character = match.group(1)
    return f"&#{ord(character)};" if character in "@:|`." else f"\\{character}"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _head(report: Report) -> str:
    head = report.headline
    lines = [
        f"## {_MARKS[head.verdict]} {head.verdict.replace('_', ' ')}: {escape(head.meaning)}",
        "",
        f"**{escape(head.score)}**, {escape(head.scope)}, subject {_code(head.subject)}",
        "",
        f"Policy {_code(head.policy_digest)}",
    ]
    lines += [f"\n> {escape(alert)}" for alert in head.alerts]
    return "\n".join(lines + _policy_changes(head.policy_changes))


def _policy_changes(changes: Sequence[str]) -> list[str]:
    """Returns all that a policy changes, folded, where the alert above has only the first."""
    if len(changes) <= LISTED_CHANGES:
        return []
    shown = [f"- {escape(change)}" for change in changes[:_SHOWN_CHANGES]]
    more = len(changes) - len(shown)
    rest = [f"- and {more} more; policy.json has the whole policy"] if more > 0 else []
    summary = f"All {len(changes)} changes of the policy"
    return [f"\n<details><summary>{summary}</summary>\n", *shown, *rest, "\n</details>"]


def _reasons(reasons: Sequence[Sentence]) -> str:
    shown = [f"- {escape(_text(reason))}" for reason in reasons[:_SHOWN_REASONS]]
    more = len(reasons) - len(shown)
    return "\n".join(shown + ([f"- and {more} more"] if more > 0 else []))


def _text(sentence: Sentence) -> str:
    return shorten("".join(span.text for span in sentence), _REASON_LENGTH)


def _changes(report: Report) -> str:
    changes = report.changes
    if changes.baseline is None:
        return "### Changes\n\nNo baseline."
    lines = [f"### Changes against {_code(changes.baseline)}", ""]
    if changes.refusal:
        lines.append(f"- Values do not compare: {escape(changes.refusal)}")
    lines += [f"- Worse: {escape(sentence)}" for sentence in changes.regressions]
    lines += [
        f"- Better: {escape(row.name)}, {escape(row.before)} before, {escape(row.after)} now"
        for row in changes.values
        if row.move == "better"
    ]
    for side, label in SIDES.items():
        found: tuple[Change, ...] = getattr(changes, side)
        ids = ", ".join(_changed(change) for change in found[:_SHOWN_CHECKS])
        more = len(found) - _SHOWN_CHECKS
        rest = f" and {more} more" if more > 0 else ""
        lines.append(f"- {label}: {ids or 'none'}{rest}")
    return "\n".join([*lines, *_uncompared(changes.uncompared)])


def _uncompared(rows: Sequence[Uncompared]) -> list[str]:
    """Returns a line with the checks that are on no side, as only one of the runs has them."""
    if not rows:
        return []
    shown = "; ".join(f"{_code(row.check)} {escape(row.why)}" for row in rows[:_SHOWN_CHECKS])
    more = len(rows) - _SHOWN_CHECKS
    return [f"- Not compared: {shown}{f' and {more} more' if more > 0 else ''}"]


def _changed(change: Change) -> str:
    before, after = (outcome.replace("_", " ") for outcome in (change.before, change.after))
    return f"{_code(change.check)} ({before} before, {after} now)"


def _trend(report: Report) -> str:
    trend = report.trend
    if trend is None:
        return ""
    rows: list[list[str]] = []
    for point in trend.points:
        if point.breaks:
            broken = escape("; ".join(point.breaks))
            rows.append([f"break: {broken}", *[""] * (len(_TREND) - 1)])
        rows.append(_point(point))
    left_out = [f"Not shown: {escape('; '.join(trend.left_out))}."] if trend.left_out else []
    return "### Trend\n\n" + "\n\n".join([_table(_TREND, rows), *left_out])


def _point(point: TrendPoint) -> list[str]:
    low, high = point.low, point.high
    state = "" if point.state == "finished" else f" ({escape(point.state)})"
    return [
        escape(point.started_at),
        "this run" if point.is_this else _code(point.run_id),
        _code(point.commit) if point.commit else "",
        escape(point.profile),
        f"{_MARKS[point.verdict]} {point.verdict.replace('_', ' ')}{state}",
        str(low) if low == high else f"{low} to {high}",
        f"{percent(point.measured)} %",
        str(point.failed),
        str(point.not_measured),
    ]


def _scores(title: str, noun: str, rows: Sequence[ScoreRow]) -> str:
    header = [noun, "score", "measured", "pass", "fail or error", "not measured", "time"]
    return f"### {title}\n\n" + _table(
        header,
        (
            [
                escape(row.name),
                f"{row.low} to {row.high}" if row.applicable else "not applicable",
                f"{row.measured_percent} %",
                str(_count(row, (Outcome.PASS,))),
                str(_count(row, _BAD)),
                str(_count(row, (Outcome.NOT_MEASURED,))),
                duration(row.duration_s),
            ]
            for row in rows
        ),
    )


def _count(row: ScoreRow, outcomes: Sequence[Outcome]) -> int:
    return sum(count for outcome, count in row.counts if outcome in outcomes)


def _checks(title: str, checks: Sequence[CheckRow], outcomes: Sequence[Outcome]) -> str:
    found = [check for check in checks if check.outcome in outcomes]
    if not found:
        return ""
    rows = (
        [
            _code(check.id),
            check.severity.value,
            check.outcome.replace("_", " "),
            escape(shorten(check.reason, _REASON_LENGTH)),
            _code(shorten(check.command, _REASON_LENGTH)),
        ]
        for check in found[:_SHOWN_CHECKS]
    )
    table = _table(["check", "severity", "outcome", "reason", "reproduce"], rows)
    more = len(found) - _SHOWN_CHECKS
    rest = f"\n\nand {more} more; the HTML report lists all." if more > 0 else ""
    return f"### {title} ({len(found)})\n\n{table}{rest}"


def _load(report: Report) -> str:
    if report.load is None:
        return ""
    facts = [
        f"- {escape(label)}: {next(iter(_cells([value])))}" for label, value in report.load.figures
    ]
    rows = [
        [escape(f"{phase.name} (void: {phase.void})" if phase.void else phase.name)]
        + [f"~~{cell}~~" if phase.void else cell for cell in _cells(phase.cells)]
        for phase in report.load.phases
    ]
    table = _table(["phase", *report.load.columns], rows)
    blocks = ["### Under load", *_doubts(report.load.doubts), "\n".join(facts), table]
    return "\n\n".join(block for block in blocks if block)


def _doubts(rows: Sequence[Doubt]) -> list[str]:
    """Returns a paragraph that names the checks a section's values are of and that did not pass."""
    named = [f"{_code(row.check)} ({row.outcome.replace('_', ' ')})" for row in rows]
    return [f"> Values of checks that did not all pass: {', '.join(named)}"] if named else []


def _cells(cells: Iterable[Figure | None]) -> Iterable[str]:
    for cell in cells:
        detail = f" ({cell.detail})" if cell and cell.detail else ""
        yield escape(f"{cell.text}{detail}") if cell else "not measured"


def _quality(report: Report) -> str:
    blocks = []
    for task in report.quality:
        rows = [[escape(arm.arm), *_cells(arm.cells)] for arm in task.arms]
        blocks.append(f"**{escape(task.task)}**\n\n" + _table(["arm", *task.columns], rows))
    head = ["### What quantization costs", *_doubts(report.quality_doubts)]
    return "\n\n".join([*head, *blocks]) if blocks else ""


def _end(report: Report) -> str:
    return (
        f"Run {_code(report.run_id)}. Every number with its evidence: `report.html` in the run "
        "directory. Recompute it: `forge-harness verify DIR`."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
