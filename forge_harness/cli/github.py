"""What GitHub Actions shows of a gate: annotations on the run, a summary on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from forge_harness.cli.terminal import printable
from forge_harness.record import CheckRecord, ItemRecord, RunRecord
from forge_harness.scoring.verdict import MEASURED_BAD, blocking_reasons
from forge_harness.types import UNKNOWN_CHECK, Outcome, Severity, Verdict

MAX_ANNOTATIONS = 10
"""GitHub keeps ten errors and ten warnings a step and drops the rest without a word."""
MAX_SUMMARY_BYTES = 900_000
"""GitHub refuses a step summary over 1 MiB as a whole."""
_SEVERE = (Severity.CRITICAL, Severity.HIGH)
_CUT = "\n\nCut here: the whole summary is longer than GitHub shows. See the HTML report.\n"


def annotation_commands(record: RunRecord, reasons: Sequence[str] = ()) -> list[str]:
    """Returns the workflow commands: at most ten errors and ten warnings, severest first.

    Errors are what fails a gate; warnings everything else that is not a pass.

    Args:
        record: The run.
        reasons: Why the gate ends with another exit code than 0. They are shown where no single
            check fails it: the score is too low, or something is missing.
    """
    order = list(Severity)
    checks = sorted(record.checks, key=lambda check: order.index(check.severity))
    errors = [check for check in checks if _fails_gate(check, record)]
    warnings = [check for check in checks if check not in errors and _noteworthy(check)]
    unscored = [
        _command("error", item.check, f"{item.nodeid}: {_why_unscored(item)}")
        for item in record.unscored_items
    ]
    errors_shown = [*(_of_check("error", check) for check in errors), *unscored]
    if not errors_shown:
        errors_shown = [_command("error", record.verdict, reason) for reason in reasons]
    return [
        *_limited("error", errors_shown),
        *_limited("warning", [_of_check("warning", check) for check in warnings]),
    ]


def _why_unscored(item: ItemRecord) -> str:
    is_known = item.check != UNKNOWN_CHECK
    return "not in the catalogue" if is_known or not item.reason else item.reason


def _fails_gate(check: CheckRecord, record: RunRecord) -> bool:
    # Of a selection any failure does, as its verdict weighs it against nothing.
    in_selection = record.verdict is Verdict.PARTIAL and check.outcome in MEASURED_BAD
    return in_selection or bool(blocking_reasons([check], ()))


def _noteworthy(check: CheckRecord) -> bool:
    if check.outcome is Outcome.NOT_MEASURED:
        return check.severity in _SEVERE
    return check.outcome not in (Outcome.PASS, Outcome.NOT_APPLICABLE)


def _of_check(kind: str, check: CheckRecord) -> str:
    title = f"{check.id} ({check.severity}): {check.outcome.replace('_', ' ')}"
    return _command(kind, title, check.reason or check.title)


def _limited(kind: str, commands: list[str]) -> list[str]:
    if len(commands) <= MAX_ANNOTATIONS:
        return commands
    more = len(commands) - MAX_ANNOTATIONS + 1
    rest = _command(kind, f"{more} more", f"{more} more of this kind; see the report.")
    return [*commands[: MAX_ANNOTATIONS - 1], rest]


def _command(kind: str, title: str, message: str) -> str:
    return f"::{kind} title={_property(title)}::{_message(message)}"


def _message(text: str) -> str:
    # What would hide or turn around other text is shown as on a terminal; the rest are the escapes
    # of actions/toolkit, packages/core/src/command.ts.
    shown = "\n".join(printable(line) for line in text.replace("\r\n", "\n").split("\n"))
    return shown.replace("%", "%25").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")


def without_commands(text: str) -> str:
    """Returns a line that the runner shows and does not obey.

    Commands of its first version ("##[stop-commands]...") are obeyed anywhere in a line, those of
    its second ("::stop-commands::...") where it begins, spaces or not.
    """
    words = text.lstrip()
    if words.startswith("::"):
        text = f"{text[: len(text) - len(words)]}: {words[1:]}"
    return text.replace("##[", "## [")


def text_without_commands(lines: Sequence[str]) -> str:
    """Returns lines, and tables of them, as one text that the runner shows and does not obey."""
    return "\n".join(without_commands(line) for text in lines for line in text.split("\n"))


def not_obeyed(text: str) -> str:
    """Returns a line made of others' words that neither a terminal nor the runner obeys."""
    return without_commands(printable(text))


def append_summary(markdown: str, environ: Mapping[str, str]) -> None:
    """Appends Markdown to the step summary, if the environment names one."""
    target = environ.get("GITHUB_STEP_SUMMARY")
    if not target:
        return
    path = Path(target)
    used = path.stat().st_size if path.exists() else 0
    with path.open("a", encoding="utf-8") as stream:
        stream.write(cut(markdown, MAX_SUMMARY_BYTES - used))


def cut(text: str, limit: int) -> str:
    """Returns text of at most `limit` bytes of UTF-8, saying so where something was cut."""
    if len(text.encode()) <= limit:
        return text
    room = max(0, limit - len(_CUT.encode()))
    kept = text.encode()[:room].decode(errors="ignore")
    return kept.rpartition("\n")[0] + _CUT


def is_action(environ: Mapping[str, str]) -> bool:
    """Returns whether this process runs in a GitHub Actions step."""
    return environ.get("GITHUB_ACTIONS") == "true"
