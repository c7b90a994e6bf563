"""The report as data: what every writer renders.

All of it comes from run.json and the policy, and from what either is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from forge_harness.load.timeline import Timeline
from forge_harness.types import Outcome, Severity, Verdict

State = Literal["pass", "warn", "fail", "error", "not_measured", "not_applicable", "info"]
"""How a figure stands: decides its icon, word and colour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A piece of a sentence; a link within the report when it has an anchor."""

    text: str
    anchor: str | None = None


Sentence = tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """What the report says first."""

    verdict: Verdict
    meaning: str
    """The verdict in one clause."""
    score: str
    """For example "Integration score 83 (at most 91), 92 % measured"."""
    low: int
    high: int
    measured_percent: int
    scope: str
    subject: str
    policy_digest: str
    alerts: tuple[str, ...]
    """What makes the record itself doubtful: not finished, scored with another policy; and what
    makes its verdict another's: a policy that is not the one that ships."""
    policy_changes: tuple[str, ...]
    """In what the policy differs from the one that ships with the harness that writes this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """A suite's or a component's line."""

    name: str
    anchor: str
    """First of its checks in the report, or the table when it has none."""
    applicable: bool
    weight: int | None
    """None for components: they have no weight of their own."""
    low: int
    high: int
    measured_percent: int
    counts: tuple[tuple[Outcome, int], ...]
    checks: int
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRow:
    """One step from 100 down to the low score."""

    label: str
    anchor: str | None
    points: str
    remaining: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One check whose outcome is another than the baseline's."""

    check: str
    anchor: str
    before: Outcome
    after: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncompared:
    """One check of only one of the two runs, or of another version in each."""

    check: str
    anchor: str | None
    """None when it is not in this run."""
    why: str


Move = Literal["worse", "better", "within", "not_judged"]
"""How a value moved: beyond what the policy allows for noise, within it, or nobody can say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedValue:
    """The score, or the value of one gate, in both runs."""

    name: str
    anchor: str
    unit: str
    before: str
    after: str
    difference: str
    allowed: str
    """In words, for example "at least 0.931"; empty when nothing is judged."""
    move: Move
    reason: str
    """Why it is worse, or not judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineRun:
    """The run that others are held against."""

    run_id: str
    started_at: str
    commit: str
    """Empty when it does not say."""
    verdict: Verdict
    low: int
    high: int
    measured_percent: int
    acceptance: str
    """Who accepted it and why; empty for a run that is given as it is."""
    outcomes: tuple[tuple[str, int, Outcome], ...]
    """Id, version and outcome of each of its checks."""
    unscored: tuple[str, ...]
    uncollected: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What changed against the baseline: each check in one of the lists at most."""

    baseline: str | None
    """Run id of the baseline; None without one."""
    refusal: str
    """Why the values of the two runs do not compare; empty when they do."""
    run: BaselineRun | None = None
    breaks: tuple[str, ...] = ()
    """What the two have not in common: "profile quick -> full"."""
    newly_failing: tuple[Change, ...] = ()
    fixed: tuple[Change, ...] = ()
    newly_not_measured: tuple[Change, ...] = ()
    newly_measured: tuple[Change, ...] = ()
    otherwise_changed: tuple[Change, ...] = ()
    """A check that warns, is flaky or waived now, or did before."""
    uncompared: tuple[Uncompared, ...] = ()
    values: tuple[MovedValue, ...] = ()
    regressions: tuple[str, ...] = ()
    """Score and gate values worse than the baseline beyond their tolerance, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrendPoint:
    """One run of the trend."""

    run_id: str
    is_this: bool
    """Whether it is the run of the report."""
    started_at: str
    commit: str
    """Its first digits, "+" behind them when tracked files had been changed; empty without."""
    profile: str
    state: str
    verdict: Verdict
    low: int
    high: int
    measured: float
    """Share of the weight, in [0, 1]."""
    failed: int
    not_measured: int
    duration_s: float | None
    digest: str
    """Of its run.json; empty for the run of the report, whose manifest has it."""
    breaks: tuple[str, ...]
    """What it has not in common with the run before; empty when the two compare."""
    compares: bool
    """Whether it compares with the run of the report."""
    counts: tuple[tuple[Outcome, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrendFigure:
    """The value of one gate over the runs of the trend."""

    name: str
    unit: str
    anchor: str | None
    values: tuple[float | None, ...]
    """One a point; None where it was not measured, or in another unit."""
    before: float | None
    """Of the run before this one; None also where the two do not compare."""
    comparable: tuple[float, ...]
    """Of the runs that compare with this one, itself included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """The kept runs that lead up to this one; the last point is this one."""

    points: tuple[TrendPoint, ...]
    figures: tuple[TrendFigure, ...]
    left_out: tuple[str, ...]
    """For example "2 runs began later"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Raw values behind a statistic."""

    count: int
    low: float
    middle: float
    """Median."""
    high: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceRow:
    """One measured value against its limit."""

    anchor: str
    name: str
    actual: str
    expected: str
    """Limit in words, for example "at most 0.1 s"; empty for values that are only recorded."""
    state: State
    reason: str
    item: str
    samples: Samples | None
    artifact: str | None
    value: float | None
    """The number behind `actual`; None for text and booleans."""
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRow:
    """One pytest item of a check."""

    nodeid: str
    outcome: Outcome
    reason: str
    duration_s: float
    attempts: int
    log: str
    warnings: tuple[str, ...] = ()
    """Python warnings given while it ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow:
    """One check with everything that was measured for it."""

    anchor: str
    id: str
    title: str
    suite: str
    component: str
    severity: Severity
    version: int
    outcome: Outcome
    reason: str
    credit: str
    points_lost: str
    duration_s: float
    command: str
    evidence: tuple[EvidenceRow, ...]
    items: tuple[ItemRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number of a table, with the evidence it came from."""

    text: str
    anchor: str | None = None
    detail: str = ""
    """Its interval, or what else qualifies it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """A check that did not pass and whose values are shown outside of it."""

    check: str
    anchor: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A loss curve: held-out or training loss over optimizer steps."""

    arm: str
    anchor: str
    steps: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRow:
    """One way to get weights (full precision, ternary, post-training) on one task."""

    arm: str
    cells: tuple[Figure | None, ...]
    """In the order of `QualityTask.columns`; None for what was not recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityTask:
    """What quantization costs on one task."""

    task: str
    columns: tuple[str, ...]
    arms: tuple[ArmRow, ...]
    comparisons: tuple[tuple[str, Figure], ...]
    curves: tuple[Curve, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPhaseRow:
    """One phase of the load campaign."""

    name: str
    cells: tuple[Figure | None, ...]
    """In the order of `LoadRun.columns`; None for what was not measured."""
    void: str
    """Why it was not the load it was meant to be; empty where it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun:
    """What the subject's server did under load."""

    columns: tuple[str, ...]
    phases: tuple[LoadPhaseRow, ...]
    figures: tuple[tuple[str, Figure], ...]
    timeline: Timeline | None
    """For the plots; None when the windows were not recorded."""
    doubts: tuple[Doubt, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WaiverRow:
    """A known failure someone owns."""

    check: str
    anchor: str | None
    owner: str
    reason: str
    issue: str
    expires: str
    live: bool
    outcome: Outcome | None
    """How its check ended; None when the run has no such check."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecificationRow:
    """One figure of the specification beside ours."""

    label: str
    claimed: str
    source: str
    """Where ours comes from: a check with its evidence, a suite, or why there is none."""
    ours: str
    state: State
    anchor: str | None
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecificationSection:
    """One of the thirteen sections of the specification."""

    number: int
    title: str
    rows: tuple[SpecificationRow, ...]

    @property
    def anchor(self) -> str:
        """Where the section is in the report."""
        return f"spec-{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What was executed, when and where: for the formats that other programs read."""

    state: str
    """Of the run: finished, interrupted, aborted; running when it was killed."""
    profile: str
    part: str
    """Which part of the profile ("shard 2/3", "selection: data"); empty for all of it."""
    shard: str
    """ "2/3"; empty when the run is no shard."""
    started_at: str
    finished_at: str | None
    environment: tuple[tuple[str, str], ...]
    """Name ("packages.torch") and value, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything a reader sees, in the order they see it."""

    run_id: str
    headline: Headline
    reasons: tuple[Sentence, ...]
    """Why the verdict is what it is; writers show the first five."""
    changes: Changes
    trend: Trend | None
    """None when no history was given."""
    suites: tuple[ScoreRow, ...]
    components: tuple[ScoreRow, ...]
    losses: tuple[LossRow, ...]
    quality: tuple[QualityTask, ...]
    quality_doubts: tuple[Doubt, ...]
    load: LoadRun | None
    checks: tuple[CheckRow, ...]
    unscored: tuple[ItemRow, ...]
    uncollected: tuple[ItemRow, ...]
    """Modules that skipped themselves: nobody knows which checks they hold."""
    waivers: tuple[WaiverRow, ...]
    specification: tuple[SpecificationSection, ...]
    provenance: tuple[tuple[str, str], ...]
    execution: Execution

    def check(self, name: str) -> CheckRow | None:
        """Returns the check of an id, or None when it was not in scope."""
        return next((check for check in self.checks if check.id == name), None)
