"""What a measure counts: opportunities to break a rule, and the places where it is broken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A line that breaks a rule.

    Attributes:
        file: Relative to the tree, forward slashes.
        line: From 1; 0 for the whole file.
        what: One clause.
    """

    file: str
    line: int
    what: str

    def sentence(self) -> str:
        """Returns the place as `file:line: what`."""
        return f"{self.file}:{self.line}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One count for one rule.

    Attributes:
        rule: 1 to 10.
        name: What is counted.
        tool: What counted it: "ast" for our own reading of the source.
        version: Of the tool.
        command: Its command line; empty for our own.
        exit_code: Of the command; None when it is our own or did not end.
        opportunities: How often the rule could have been broken.
        places: Where it was.
        missing: Why a tool did not count; its share then scores zero.
    """

    rule: int
    name: str
    opportunities: int
    places: tuple[Place, ...]
    tool: str = "ast"
    version: str = ""
    command: tuple[str, ...] = ()
    exit_code: int | None = None
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Count:
    """Opportunities and places of one file, for one measure."""

    rule: int
    name: str
    opportunities: int
    places: tuple[Place, ...]


def merged(counts: Iterable[Count]) -> list[Measure]:
    """Adds up the counts of all files by rule and name."""
    opportunities: dict[tuple[int, str], int] = {}
    places: dict[tuple[int, str], list[Place]] = {}
    for count in counts:
        key = (count.rule, count.name)
        opportunities[key] = opportunities.get(key, 0) + count.opportunities
        places.setdefault(key, []).extend(count.places)
    return [
        Measure(
            rule=rule,
            name=name,
            opportunities=total,
            places=tuple(sorted(places[(rule, name)])),
        )
        for (rule, name), total in sorted(opportunities.items())
    ]
