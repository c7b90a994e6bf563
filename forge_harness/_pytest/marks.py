"""The marker `forge_check`: which check an item belongs to."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from forge_harness.paths import resolved_path, suites_dir
from forge_harness.types import UNKNOWN_CHECK

MARKER = "forge_check"
MARKER_LINE = (
    "forge_check(id, *, title=None, severity=None, component=None): the test belongs to the "
    "check `id` of the catalogue; title and severity together define a check of your own."
)
TIMING_LINE = (
    "forge_timing: the test compares times; it runs after all checks that do not, and while the "
    "other workers of the session run nothing."
)

_ID = re.compile(r"[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*")
_SEVERITIES = ("critical", "high", "medium", "low")


@dataclass(frozen=True, slots=True)
class CheckMark:
    """What the marker of one item says.

    `problem` is the sentence the item fails with when the marker is unusable. Raising in
    collection instead would end an xdist session with INTERNALERROR (seen with xdist 3.8).
    """

    check: str
    title: str | None = None
    severity: str | None = None
    component: str = "user"
    problem: str | None = None
    dropped: bool = False
    """Deselected by something other than the forge options (`-k`, `-m`, a plugin): in scope,
    not measured."""
    timeout_s: float | None = None
    """Time limit of the test's own `timeout` marker, which beats the catalogue's."""
    is_shipped: bool = False
    """Whether the test is one of the shipped suites."""

    @property
    def is_inline(self) -> bool:
        """Whether the marker defines the check itself."""
        return self.title is not None and self.severity is not None

    def with_problem(self, problem: str) -> CheckMark:
        """Returns the mark as one whose item fails with `problem`."""
        return replace(self, problem=problem)

    def as_dropped(self) -> CheckMark:
        """Returns the mark as one whose item will not run."""
        return replace(self, dropped=True)

    def to_json(self) -> dict[str, Any]:
        """Returns the mark as JSON values."""
        return asdict(self)


def is_timed(item: pytest.Item) -> bool:
    """Returns whether a test compares times."""
    return item.get_closest_marker("forge_timing") is not None


def read_mark(item: pytest.Item) -> CheckMark | None:
    """Returns what the marker of an item says, or None for a test that is no check."""
    marks = list(item.iter_markers(MARKER))
    if not marks:
        return None
    read = replace(
        _bind(*marks[0].args, **marks[0].kwargs),
        timeout_s=own_limit(item),
        is_shipped=_is_shipped(item.path),
    )
    if len(marks) > 1 and read.problem is None:
        return read.with_problem(
            f"{item.name} carries {len(marks)} forge_check markers; an item belongs to one check."
        )
    return read


def _is_shipped(file: Path) -> bool:
    return resolved_path(file).is_relative_to(resolved_path(suites_dir()))


def own_limit(item: pytest.Item) -> float | None:
    """Returns the seconds of an item's `timeout` marker (pytest-timeout); None without a limit."""
    mark = item.get_closest_marker("timeout")
    if mark is None:
        return None
    stated: Any = mark.args[0] if mark.args else mark.kwargs.get("timeout")
    try:
        seconds = float(stated)  # pytest-timeout takes "60" as well
    except (TypeError, ValueError):
        return None
    return seconds if seconds > 0 and math.isfinite(seconds) else None


def _bind(*args: object, **kwargs: object) -> CheckMark:
    names = {"title", "severity", "component"}
    if len(args) != 1 or not isinstance(args[0], str):
        return _unusable(
            f"forge_check takes one check id, got {args!r}: forge_check('suite.name')."
        )
    check = args[0]
    if unknown := sorted(set(kwargs) - names):
        return _unusable(
            f"forge_check({check!r}) does not take {', '.join(unknown)}; it takes "
            f"{', '.join(sorted(names))}.",
            check,
        )
    if not _ID.fullmatch(check):
        return _unusable(
            f"Check id {check!r} is not of the form suite.name (lower case, digits, underscores).",
            check,
        )
    return _inline(check, kwargs)


def _inline(check: str, kwargs: dict[str, object]) -> CheckMark:
    title, severity = kwargs.get("title"), kwargs.get("severity")
    component = kwargs.get("component")
    if (title is None) != (severity is None):
        return _unusable(
            f"forge_check({check!r}) gives {'title' if severity is None else 'severity'} alone; "
            "a check of your own needs title and severity, a catalogue check neither.",
            check,
        )
    if severity is not None and severity not in _SEVERITIES:
        return _unusable(
            f"forge_check({check!r}): severity {severity!r} is none of {', '.join(_SEVERITIES)}.",
            check,
        )
    if title is not None and (not isinstance(title, str) or not title.strip()):
        return _unusable(f"forge_check({check!r}): title {title!r} is not a sentence.", check)
    return CheckMark(
        check,
        title if isinstance(title, str) else None,
        str(severity) if severity is not None else None,
        str(component) if component is not None else "user",
    )


def _unusable(problem: str, check: str = UNKNOWN_CHECK) -> CheckMark:
    return CheckMark(check, problem=problem)


def resolve(
    marks: dict[str, CheckMark], known: dict[str, tuple[str, str]], shipped: Collection[str]
) -> dict[str, CheckMark]:
    """Returns the marks with what can only be seen together: unknown and conflicting ids.

    Args:
        marks: Node id -> mark, in collection order.
        known: Check id -> (title, severity) of the catalogues.
        shipped: Which of them are checks of the shipped suites.
    """
    inline: dict[str, tuple[str, str]] = {}
    resolved: dict[str, CheckMark] = {}
    for nodeid, mark in marks.items():
        resolved[nodeid] = _resolve_one(_at_home(mark, shipped), known, inline)
    # A bare marker may stand above the one that defines its check.
    for nodeid, mark in resolved.items():
        if mark.problem is None and mark.check not in known and mark.check not in inline:
            resolved[nodeid] = mark.with_problem(_unknown(mark.check, {*known, *inline}))
    return resolved


def _at_home(mark: CheckMark, shipped: Collection[str]) -> CheckMark:
    """A user's test would dilute a shipped check, or stand for it, under the shipped policy."""
    if mark.problem is not None or mark.is_shipped or mark.check not in shipped:
        return mark
    return mark.with_problem(
        f"{mark.check!r} is a shipped check, which the shipped suites alone measure; choose an id "
        "of your own."
    )


def _resolve_one(
    mark: CheckMark, known: dict[str, tuple[str, str]], inline: dict[str, tuple[str, str]]
) -> CheckMark:
    if mark.problem is not None or not mark.is_inline:
        return mark
    said = (str(mark.title), str(mark.severity))
    if mark.check in known:
        if said == known[mark.check]:
            return mark
        return mark.with_problem(
            f"Check {mark.check!r} is in the catalogue with another title or severity; leave "
            "title and severity out of the marker, or choose another id."
        )
    if inline.setdefault(mark.check, said) != said:
        return mark.with_problem(
            f"Check {mark.check!r} is defined twice with different titles or severities; give "
            "them in one marker and only the id in the others."
        )
    return mark


def _unknown(check: str, valid: set[str]) -> str:
    from forge_harness.errors import nearest

    close = nearest(check, valid)
    hint = f" Did you mean {close!r}?" if close else ""
    return (
        f"Unknown check {check!r}.{hint} Add it to a catalogue.toml beside the suite, or give "
        "title and severity in the marker."
    )
