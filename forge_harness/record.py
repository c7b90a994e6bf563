"""run.json: what a run measured, as a schema-versioned record.

Everything a report shows is derived from this record and the policy beside it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from forge_harness.types import UNKNOWN_CHECK, Outcome, Profile, Severity, Verdict

RECORD_SCHEMA_VERSION = "1.0"

_STRICT = ConfigDict(extra="forbid", frozen=True)
_SHARD = "^([1-9][0-9]{0,3}/[1-9][0-9]{0,3})?$"
"""As `forge_harness.sharding` writes it; empty where there is none."""


def _zoned(text: str) -> str:
    """Returns a time as it was written; two of a run can be told apart only with their zones."""
    expected = "expected a time with its zone, such as 2026-01-02T03:04:05Z"
    try:
        found = datetime.fromisoformat(text)
        found.astimezone(UTC)  # of the first and the last day not in every zone
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no time; {expected}") from None
    if found.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone; {expected}")
    return text


def moment(text: str) -> datetime:
    """Returns a `Moment` as a time."""
    return datetime.fromisoformat(text)


def _in_order(started_at: str, finished_at: str | None) -> None:
    if finished_at is not None and moment(finished_at) < moment(started_at):
        raise ValueError(f"finished_at {finished_at} is before started_at {started_at}")


Moment = Annotated[str, AfterValidator(_zoned), Field(json_schema_extra={"format": "date-time"})]
"""A time, ISO 8601 with its zone."""
Scalar = bool | int | float | str
Finite = float
"""JSON has no non-finite numbers; `canonical_json` refuses them."""


class EvidenceRecord(BaseModel):
    """One measured value of one pytest item (see `forge_harness.evidence.Evidence`)."""

    model_config = _STRICT

    item: str
    """Node id of the pytest item that recorded it."""
    name: str
    value: Scalar
    unit: str
    limit: Scalar | list[float] | None
    direction: Literal["at_most", "at_least", "equal", "within", "record"]
    level: Literal["fail", "warn"] = "fail"
    reason: str
    samples: list[float] | None
    artifact: str | None = None


class ItemRecord(BaseModel):
    """One pytest item of a check."""

    model_config = _STRICT

    nodeid: str
    check: str
    outcome: Outcome
    """After the evidence rules, before waivers: pass, warn, flaky, fail, error, not_measured,
    not_applicable."""
    reason: str
    duration_s: float
    attempts: int = 1
    evidence: list[EvidenceRecord] = Field(default_factory=list)
    log: str | None = None
    """Last lines of the failure text, when there is one."""
    warnings: list[str] = Field(default_factory=list)
    """Python warnings given while it ran, a line each; they do not change its outcome."""

    @property
    def hides_checks(self) -> bool:
        """Whether it was left out before anybody knew what it checks: not measured, not failed."""
        return self.check == UNKNOWN_CHECK and self.outcome is Outcome.NOT_MEASURED


class CheckItem(BaseModel):
    """An item as listed under its check; its evidence is in the check's list."""

    model_config = _STRICT

    nodeid: str
    outcome: Outcome
    reason: str
    duration_s: float
    attempts: int = 1
    log: str | None = None
    warnings: list[str] = Field(default_factory=list)


class Waiver(BaseModel):
    """A known failure someone owns, until a date."""

    model_config = _STRICT

    check: str
    owner: str
    reason: str
    issue: str
    expires: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")


class CheckRecord(BaseModel):
    """One check id of the run's scope."""

    model_config = _STRICT

    id: str
    title: str
    suite: str
    component: str
    severity: Severity
    version: int
    outcome: Outcome
    reason: str
    duration_s: float
    credit_low: str
    """Exact fraction, for example "1/2"."""
    credit_high: str
    command: str
    """Reproduces this check."""
    items: list[CheckItem]
    evidence: list[EvidenceRecord]


class ScoreRecord(BaseModel):
    """An interval: what is proved, and what it could be at most if all unmeasured checks passed."""

    model_config = _STRICT

    low: int = Field(ge=0, le=100)
    high: int = Field(ge=0, le=100)


class SuiteRecord(BaseModel):
    """One suite of the run's scope."""

    model_config = _STRICT

    name: str
    weight: int
    low: int
    high: int
    coverage: float
    counts: dict[str, int]
    """Outcome -> number of checks."""
    duration_s: float


class ScopeRecord(BaseModel):
    """What the run set out to measure."""

    model_config = _STRICT

    profile: Profile
    suites: list[str]
    """`--suite` selection; empty for the whole profile."""
    checks: list[str]
    """`--check` selection, or the checks of the shard; empty for the whole profile."""
    shard: str = Field(default="", pattern=_SHARD)
    """ "2/3" of a run that is one of three parts of the profile; empty otherwise."""
    in_scope: int
    total: int

    @property
    def part(self) -> str:
        """Which part of the profile it is: "shard 2/3", "selection: data"; empty for all of it."""
        if self.shard:
            return f"shard {self.shard}"
        selected = [*self.suites, *self.checks]
        return f"selection: {', '.join(selected)}" if selected else ""


class SubjectRecord(BaseModel):
    """What was validated."""

    model_config = _STRICT

    spec: str
    name: str
    capabilities: list[str]
    digest: str | None = None
    """sha256 of the subject's source file, where it is one."""


class ShardRecord(BaseModel):
    """One of the runs a merged run was put together from; its run.json is kept beside."""

    model_config = _STRICT

    file: str
    """Its run.json, relative to the run directory."""
    digest: str
    """Of the bytes of that file, "sha256:...": a merged run verifies only with all of them."""
    run_id: str
    scope: ScopeRecord
    state: Literal["finished", "interrupted", "aborted"]
    command: list[str]
    environment: dict[str, Any]
    """Where its checks were measured."""
    started_at: Moment
    finished_at: Moment | None

    @model_validator(mode="after")
    def _times(self) -> Self:
        _in_order(self.started_at, self.finished_at)
        return self


class RunRecord(BaseModel):
    """The whole of run.json."""

    model_config = _STRICT

    schema_version: Literal["1.0"] = "1.0"
    run_id: str
    state: Literal["running", "finished", "interrupted", "aborted"]
    """`running` is what a killed run leaves behind."""
    state_reason: str = ""
    verdict: Verdict
    verdict_reasons: list[str]
    score: ScoreRecord
    coverage: float
    """Weight measured with evidence over applicable weight, in [0, 1], floored to 4 digits."""
    scope: ScopeRecord
    suites: list[SuiteRecord]
    checks: list[CheckRecord]
    unscored_items: list[ItemRecord] = Field(default_factory=list)
    """Items whose check id the catalogue does not have. They block: the catalogue and the
    collected checks must match."""
    waivers: list[Waiver]
    policy_digest: str
    subject: SubjectRecord
    environment: dict[str, Any]
    declared: dict[str, str]
    """Configuration values that not-applicable predicates read."""
    seed: int
    command: list[str]
    started_at: Moment
    finished_at: Moment | None
    shards: list[ShardRecord] = Field(default_factory=list)
    """The runs a merged run was put together from; empty for a run of its own. A merged run has
    of `environment` what all of them share."""
    files: dict[str, str] | None = None
    """Path -> "sha256:..." of what the run left besides items and evidence: study.json and logs/.
    Of a merged run these are in the records of its shards. None, and not in run.json, of a run
    that was recorded before this was written down."""

    @model_validator(mode="after")
    def _times(self) -> Self:
        _in_order(self.started_at, self.finished_at)
        return self

    @model_serializer(mode="wrap")
    def _as_it_was_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Writing an older record again keeps its bytes, by whose digest others know it.
        values: dict[str, Any] = handler(self)
        if self.files is None:
            values.pop("files", None)
        return values


def record_json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of run.json."""
    return RunRecord.model_json_schema()
