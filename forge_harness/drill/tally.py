"""What a campaign found: counts by what happened after each fault, and examples of what went wrong.

The words: *acknowledged* commits returned to their caller before the fault; *lost* ones are no
longer there; *torn* stores show neither the old nor the new states; a *silent* answer is wrong and
nobody complained; an *unrecoverable* store cannot be opened, read or written any more; commits *in
doubt* are there, whole, without having been acknowledged, which is allowed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from forge_harness.errors import several

_FINDINGS = 20
"""Examples kept of each campaign; the counts are complete."""


class Status(StrEnum):
    """How a campaign ended."""

    HELD = "held"
    LOST = "lost"
    """Something was lost, torn, silently wrong or unrecoverable."""
    NOT_MEASURED = "not measured"


class NotMeasured(Exception):
    """A campaign cannot run on this machine; the message is the reason."""


class Enough(Exception):
    """A campaign that was to stop at the first thing that goes wrong has found it."""


class Result(StrEnum):
    """What was found after one fault."""

    OLD = "old"
    """Exactly what was acknowledged last."""
    NEW = "new"
    """A commit that was begun and not acknowledged, whole."""
    DETECTED = "detected"
    """Damage was there and was reported."""
    HARMLESS = "harmless"
    """Damage to bytes nothing depends on."""
    REFUSED = "refused"
    """The operation was turned down with an error and changed nothing."""
    LOST = "lost"
    TORN = "torn"
    SILENT = "silent"
    UNRECOVERABLE = "unrecoverable"


BAD = (Result.LOST, Result.TORN, Result.SILENT, Result.UNRECOVERABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one trial found."""

    result: Result
    message: str = ""
    acknowledged: int = 0
    recovery_s: float | None = None
    """Duration of the first open after the fault."""
    orphans: int = 0


def hung(error: TimeoutError) -> Finding:
    """Returns the finding of a trial whose program did not end."""
    return Finding(result=Result.UNRECOVERABLE, message=str(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignReport:
    """The counts of one campaign."""

    name: str
    status: Status
    reason: str = ""
    """Why it was not measured, or what went wrong first."""
    seed: int = 0
    points: int = 0
    """Places a fault can be put, all enumerated; 0 where places are drawn at random."""
    points_tried: int = 0
    trials: int = 0
    acknowledged: int = 0
    lost: int = 0
    torn: int = 0
    silent: int = 0
    unrecoverable: int = 0
    in_doubt: int = 0
    orphans: int = 0
    """Files no state needs, left by faults; a collection removes them."""
    recovery_p50_s: float | None = None
    recovery_max_s: float | None = None
    details: Mapping[str, int] = field(default_factory=dict)
    """Counts of this campaign only."""
    findings: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def bad(self) -> int:
        """Trials that broke the promise."""
        return self.lost + self.torn + self.silent + self.unrecoverable

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {**asdict(self), "details": dict(self.details), "findings": list(self.findings)}


class Tally:
    """Counts the findings of one campaign.

    Args:
        name: The campaign.
        seed: What every random choice came from.
        stop_early: Whether the first thing that goes wrong ends the campaign.
    """

    def __init__(self, name: str, seed: int, *, stop_early: bool = False) -> None:
        self.name = name
        self.seed = seed
        self.points = 0
        self.points_tried = 0
        self._stop_early = stop_early
        self.details: Counter[str] = Counter()
        self._results: Counter[Result] = Counter()
        self._acknowledged = 0
        self._orphans = 0
        self._recovery: list[float] = []
        self._findings: list[str] = []
        self._missed: list[str] = []

    @property
    def bad(self) -> int:
        """Trials so far that broke the promise."""
        return sum(self._results[result] for result in BAD)

    def add(self, finding: Finding, *, where: str) -> None:
        """Counts a trial; `where` says which, and is kept when it went wrong.

        Raises:
            Enough: It went wrong and the campaign was to stop then.
        """
        self._results[finding.result] += 1
        self.details[finding.result.value] += 1
        self._acknowledged += finding.acknowledged
        self._orphans += finding.orphans
        if finding.recovery_s is not None:
            self._recovery.append(finding.recovery_s)
        if finding.result in BAD and len(self._findings) < _FINDINGS:
            self._findings.append(f"{where}: {finding.result.value}: {finding.message}")
        if self._stop_early and self.bad:
            raise Enough

    def miss(self, where: str) -> None:
        """Notes a trial whose fault never struck: it proved nothing."""
        self._missed.append(where)
        self.details["not struck"] += 1

    def report(self, seconds: float = 0.0) -> CampaignReport:
        """Returns the counts so far; a campaign that tried nothing measured nothing."""
        trials = sum(self._results.values())
        status, reason = Status.HELD, ""
        if self.bad:
            status, reason = Status.LOST, self._findings[0]
        elif self._missed:
            status = Status.NOT_MEASURED
            reason = f"{several(len(self._missed), 'fault')} never struck, first: {self._missed[0]}"
        elif not trials:
            status, reason = Status.NOT_MEASURED, "no trial was made"
        return CampaignReport(
            name=self.name,
            status=status,
            reason=reason,
            seed=self.seed,
            points=self.points,
            points_tried=self.points_tried,
            trials=trials,
            acknowledged=self._acknowledged,
            lost=self._results[Result.LOST],
            torn=self._results[Result.TORN],
            silent=self._results[Result.SILENT],
            unrecoverable=self._results[Result.UNRECOVERABLE],
            in_doubt=self._results[Result.NEW],
            orphans=self._orphans,
            recovery_p50_s=_quantile(self._recovery, 0.5),
            recovery_max_s=max(self._recovery, default=None),
            details=dict(sorted(self.details.items())),
            findings=tuple(self._findings),
            seconds=seconds,
        )


def not_measured(name: str, seed: int, reason: str) -> CampaignReport:
    """Returns the report of a campaign that this machine cannot run."""
    return CampaignReport(name=name, status=Status.NOT_MEASURED, reason=reason, seed=seed)


def _quantile(values: Sequence[float], share: float) -> float | None:
    """Smallest value that at least `share` of all do not exceed."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
