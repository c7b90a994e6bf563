"""What a drill of the suites found: which seeded defects were killed, and by which check.

A defect is *killed* when the check that must see it is red and says why; red for another reason,
by a crash, or somewhere else only is not counted. It is *equivalent* when it does not differ from
the reference subject, which is a fault of the defect. Sound variants for which a check is red are
*false alarms*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from forge_harness.drill.defect import Defect
from forge_harness.scoring.statistics import clopper_pearson
from forge_harness.types import Outcome

SCHEMA = "forge-drill-suites/1"
RED = frozenset({Outcome.FAIL, Outcome.ERROR, Outcome.FLAKY})
UNREACHED = "The drill was stopped before its turn was over."
"""Reason, or problem, of a subject that a stopped drill has nothing of."""


class Status(StrEnum):
    """How a seeded defect ended."""

    KILLED = "killed"
    OTHER_REASON = "other reason"
    """The check is red, and does not name what is wrong."""
    CRASHED = "crashed"
    """The check could not finish: nobody learns what is wrong."""
    ELSEWHERE = "elsewhere"
    """Another check of the suite is red; the one that must see it is not."""
    SURVIVED = "survived"
    EQUIVALENT = "equivalent"
    """Nothing it does differs from the reference subject."""
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Found:
    """How one check ended for one subject."""

    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DefectResult:
    """One row of the kill matrix."""

    id: str
    title: str
    stage: str
    source: str
    subtlety: int
    check: str
    status: Status
    reason: str
    """What the check said, or why there is no kill."""
    outcomes: Mapping[str, str]
    """Outcome of each check that ran."""
    command: str
    """Shows the same in a run of its own."""
    reference: str
    """Digest of what the reference subject does."""
    seeded: str
    """Digest of what the defect does."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns the row for a JSON document."""
        return {**asdict(self), "status": self.status.value}


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantResult:
    """A sound subject: how the checks ended that must not be red for it."""

    id: str
    title: str
    outcomes: Mapping[str, str]
    alarms: Mapping[str, str]
    """Check -> reason, of those that are red."""
    problem: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """Killed of those that could be: a share with its exact 95 % interval.

    The seeds are chosen, not drawn: the interval says how much so few of them can show.
    """

    name: str
    killed: int
    of: int
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SuitesReport:
    """The kill matrix, the false alarms, and what they were measured with."""

    defects: Sequence[DefectResult]
    variants: Sequence[VariantResult]
    profile: str
    seed: int
    policy_digest: str
    environment: Mapping[str, Any]
    started_at: str
    finished_at: str
    seconds: float

    def count(self, status: Status) -> int:
        """Returns how many defects ended so."""
        return sum(result.status is status for result in self.defects)

    @property
    def alarms(self) -> int:
        """False alarms: sound subjects times checks that are red for them."""
        return sum(len(variant.alarms) for variant in self.variants)

    @property
    def measured_on_variants(self) -> int:
        """Sound subjects times checks that were measured."""
        unmeasured = (Outcome.NOT_MEASURED, Outcome.NOT_APPLICABLE)
        outcomes = (outcome for variant in self.variants for outcome in variant.outcomes.values())
        return sum(outcome not in unmeasured for outcome in outcomes)

    @property
    def status(self) -> str:
        """`held`, `missed` or `not measured`."""
        fine = (Status.KILLED, Status.NOT_MEASURED)
        missed = any(result.status not in fine for result in self.defects)
        if missed or self.alarms:
            return "missed"
        unmeasured = any(
            variant.problem or Outcome.NOT_MEASURED in variant.outcomes.values()
            for variant in self.variants
        )
        if unmeasured or not self.defects or self.count(Status.NOT_MEASURED):
            return "not measured"
        return "held"

    @property
    def unreached(self) -> int:
        """Subjects, defects and variants, that were still to be drilled when it was stopped."""
        rows = [row.reason for row in self.defects] + [row.problem for row in self.variants]
        return rows.count(UNREACHED)

    def power(self, by: str) -> list[Power]:
        """Returns the power of each stage, suite or subtlety, in order of appearance."""
        groups: dict[str, list[DefectResult]] = {}
        for result in self.defects:
            groups.setdefault(_group(result, by), []).append(result)
        return [power_of(name, results) for name, results in groups.items()]

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON document."""
        false_alarms = clopper_pearson(self.alarms, self.measured_on_variants)
        return {
            "schema_version": SCHEMA,
            "status": self.status,
            "is_complete": not self.unreached,
            "power": asdict(power_of("all", self.defects)),
            "stages": [asdict(power) for power in self.power("stage")],
            "suites": [asdict(power) for power in self.power("suite")],
            "subtleties": [asdict(power) for power in self.power("subtlety")],
            "false_alarms": {
                "alarms": self.alarms,
                "of": self.measured_on_variants,
                "low": false_alarms[0],
                "high": false_alarms[1],
            },
            "defects": [result.to_json() for result in self.defects],
            "variants": [asdict(variant) for variant in self.variants],
            "profile": self.profile,
            "seed": self.seed,
            "policy_digest": self.policy_digest,
            "environment": dict(self.environment),
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "seconds": self.seconds,
        }


def power_of(name: str, results: Iterable[DefectResult]) -> Power:
    """Returns the share of these defects that were killed; what was not measured is left out."""
    out = (Status.EQUIVALENT, Status.NOT_MEASURED)
    counted = [result for result in results if result.status not in out]
    killed = sum(result.status is Status.KILLED for result in counted)
    low, high = clopper_pearson(killed, len(counted))
    return Power(name=name, killed=killed, of=len(counted), low=low, high=high)


def judged(
    defect: Defect, found: Mapping[str, Found], sound: Mapping[str, Found]
) -> tuple[Status, str]:
    """Returns how a defect ended that is alive, and why.

    Args:
        defect: The defect.
        found: How the checks ended for it.
        sound: How they ended for the reference subject: a check that is not green there proves
            nothing here.
    """
    reference = sound.get(defect.check)
    if reference is None or reference.outcome is not Outcome.PASS:
        said = "was not run" if reference is None else f"is {_words(reference)}"
        return Status.NOT_MEASURED, f"For the reference subject {defect.check} {said}."
    own = found.get(defect.check)
    if own is None:
        return Status.NOT_MEASURED, f"{defect.check} left no record."
    if own.outcome is Outcome.FAIL:
        named = defect.shows in own.reason
        return (Status.KILLED if named else Status.OTHER_REASON), own.reason
    if own.outcome is Outcome.ERROR:
        return Status.CRASHED, own.reason
    if own.outcome in (Outcome.NOT_MEASURED, Outcome.NOT_APPLICABLE):
        return Status.NOT_MEASURED, f"{defect.check} is {_words(own)}"
    others = [
        check
        for check, one in found.items()
        if one.outcome in RED and sound.get(check, one).outcome not in RED
    ]
    if others:
        return Status.ELSEWHERE, f"{defect.check} is {_words(own)}; red: {', '.join(others)}"
    return Status.SURVIVED, f"{defect.check} is {_words(own)}"


def _words(found: Found) -> str:
    outcome = found.outcome.value.replace("_", " ")
    return f"{outcome}: {found.reason}" if found.reason else outcome


def _group(result: DefectResult, by: str) -> str:
    if by == "suite":
        return result.check.partition(".")[0]
    return str(getattr(result, by))
