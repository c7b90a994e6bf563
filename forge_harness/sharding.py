"""Shards of a run: which of the checks in scope one of several CI jobs runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from forge_harness.errors import UsageError, several
from forge_harness.policy import CatalogueEntry

STUDY_CAPABILITY = "MeasuresQuality"
"""Checks that need it share one set of training runs, the longest single part of a run."""
_SHARD = re.compile(r"([1-9][0-9]{0,3})/([1-9][0-9]{0,3})")


@dataclass(frozen=True, slots=True)
class Shard:
    """One part of a run that is cut into `count`."""

    index: int
    """From 1 to `count`."""
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def is_first(self) -> bool:
        """Whether it also takes what belongs to no check of the catalogue."""
        return self.index == 1


def parse_shard(text: str) -> Shard:
    """Reads "2/3".

    Raises:
        UsageError: The text is something else, or the index is over the count.
    """
    match = _SHARD.fullmatch(text)
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"Shard {text!r} is not I/N; expected 1/N to N/N, for example 2/3.")
    return Shard(int(match[1]), int(match[2]))


def shard_of(entries: Sequence[CatalogueEntry], shard: Shard) -> tuple[CatalogueEntry, ...]:
    """Returns the entries of one shard, in their order; every entry is in exactly one.

    What shares a costly set-up stays together: the checks of a suite, and those that need the
    quality study. Such units go, the longest first, to the shard with the least to do; as no
    durations are known beforehand, the time limits of the checks stand for them.

    Args:
        entries: The checks in scope; the same for every shard.
        shard: Which shard.

    Raises:
        UsageError: There are fewer units than shards, so that one would be empty.
    """
    limits: dict[str, float] = {}
    for entry in entries:
        limits[_unit(entry)] = limits.get(_unit(entry), 0.0) + entry.timeout_s
    if shard.count > len(limits):
        raise UsageError(
            f"Shard {shard} would be empty: of {several(len(entries), 'check')} there can be "
            f"{several(len(limits), 'part')} (a suite stays whole); choose at most "
            f"{several(len(limits), 'shard')}."
        )
    loads = [0.0] * shard.count
    placed: dict[str, int] = {}
    for unit in sorted(limits, key=lambda name: (-limits[name], name)):
        placed[unit] = loads.index(min(loads))
        loads[placed[unit]] += limits[unit]
    return tuple(entry for entry in entries if placed[_unit(entry)] == shard.index - 1)


def _unit(entry: CatalogueEntry) -> str:
    return STUDY_CAPABILITY if STUDY_CAPABILITY in entry.requires else entry.suite
