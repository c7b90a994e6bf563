"""Baselines: what an accepted run is held against later, as a record or as a file under review."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from forge_harness.canonical import json_fault, read_canonical
from forge_harness.durable import write_durably
from forge_harness.errors import ConfigError
from forge_harness.record import Moment, RunRecord, ScoreRecord
from forge_harness.scoring import judged_on
from forge_harness.types import Outcome, Verdict

BASELINE_FILE = "forge-baseline.json"
_STRICT = ConfigDict(extra="forbid", frozen=True)
_Kind = TypeVar("_Kind")
_MACHINE = ("os", "machine", "cpu", "cpu_usable")
_REFUSALS = {
    "machine class": (
        "the machine class is {ours}, the baseline's {theirs}; measure a baseline here"
    ),
    "policy": "the policies differ; rescore the baseline or accept a new one",
    "subject": "the subject is {ours!r}, the baseline's {theirs!r}",
    "profile": "the profile is {ours}, the baseline's {theirs}",
    # A selection has fewer gates and a score of its own: it would let every drop pass.
    "selection": "the run covers {ours}, the baseline {theirs}",
    # What is declared missing is not applicable and costs nothing.
    "declared": "the run declares {ours}, the baseline {theirs}",
}
"""Compared fact -> why two runs that differ in it do not compare; the first one is told."""


def _all_facts(facts: dict[str, str | None]) -> dict[str, str | None]:
    if facts.keys() != _REFUSALS.keys():
        raise ValueError(f"are {', '.join(facts)}; expected {', '.join(_REFUSALS)}")
    return facts


Facts = Annotated[dict[str, str | None], AfterValidator(_all_facts)]
"""See `compared_facts`."""


class BaselineCheck(BaseModel):
    """How one check of the baseline ended."""

    model_config = _STRICT

    version: int
    """Checks of another version have another meaning."""
    outcome: Outcome


class Acceptance(BaseModel):
    """Who accepted a run as the baseline, and why."""

    model_config = _STRICT

    owner: str
    reason: str
    accepted_on: str
    expires: str = ""
    """Last day it is good for, ISO 8601; empty for ever."""
    run_digest: str
    """Of the accepted run.json, "sha256:...": it can be held against the run itself."""

    @field_validator("owner", "reason")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("is empty; expected text")
        return text

    @field_validator("accepted_on", "expires")
    @classmethod
    def _is_a_day(cls, text: str) -> str:
        return date.fromisoformat(text).isoformat() if text else text


class RunInBrief(BaseModel):
    """What is kept of any run that others are shown beside."""

    model_config = _STRICT

    run_id: str
    started_at: Moment
    commit: str | None
    dirty: bool | None
    facts: Facts
    state: str
    verdict: Verdict
    score: ScoreRecord
    coverage: float = Field(ge=0, le=1)

    @field_validator("score")
    @classmethod
    def _is_an_interval(cls, score: ScoreRecord) -> ScoreRecord:
        if score.low > score.high:
            raise ValueError(f"is {score.low} to {score.high}; expected low to high")
        return score


class Baseline(RunInBrief):
    """What of a run others are held against."""

    schema_version: Literal["1.0"] = "1.0"
    acceptance: Acceptance | None = None
    """None of a run directory that is given as a baseline."""
    run_digest: str | None = None
    """Of the run.json of such a directory, "sha256:..."; a file has that of its run in
    `acceptance`."""
    gates: dict[str, float]
    """Gate -> value, in the unit of its threshold; without those that were not measured."""
    checks: dict[str, BaselineCheck]
    unscored: tuple[str, ...] = ()
    """Items that had no place in its score, by node id."""
    uncollected: tuple[str, ...] = ()
    """Modules that skipped themselves, likewise."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_known(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.run_digest is None:
            values.pop("run_digest", None)
        return values

    @property
    def policy_digest(self) -> str:
        """The policy it was scored with."""
        return str(self.facts["policy"])


AcceptedRun = RunRecord | Baseline
"""A run that was accepted before: its record, or what was kept of it."""


def in_brief(record: RunRecord) -> dict[str, Any]:
    """Returns the fields of `RunInBrief`."""
    return {
        "run_id": record.run_id,
        "started_at": record.started_at,
        "commit": _said(record, "git_commit", str),
        "dirty": _said(record, "git_dirty", bool),
        "facts": compared_facts(record),
        "state": record.state,
        "verdict": record.verdict,
        "score": record.score,
        "coverage": record.coverage,
    }


def _said(record: RunRecord, key: str, kind: type[_Kind]) -> _Kind | None:
    """Returns a value of the environment, of which the schema says nothing; None for any other."""
    value = record.environment.get(key)
    return value if isinstance(value, kind) else None


def baseline_of(
    record: RunRecord, gates: Mapping[str, float], acceptance: Acceptance | None = None
) -> Baseline:
    """Returns what of a run others are held against.

    Args:
        record: The run.
        gates: Gate -> value of the run.
        acceptance: Who accepted it, for a file.
    """
    return Baseline(
        **in_brief(record),
        acceptance=acceptance,
        gates=dict(gates),
        checks={
            check.id: BaselineCheck(version=check.version, outcome=check.outcome)
            for check in record.checks
        },
        unscored=tuple(i.nodeid for i in record.unscored_items if not i.hides_checks),
        uncollected=tuple(i.nodeid for i in record.unscored_items if i.hides_checks),
    )


def write_baseline(file: Path, baseline: Baseline) -> None:
    """Writes a baseline so that a review shows each value that moved on a line of its own.

    Raises:
        OSError: It cannot be written; an earlier file is untouched.
    """
    text = json.dumps(baseline.model_dump(mode="json"), indent=2, sort_keys=True)
    write_durably(file, f"{text}\n".encode())


def read_baseline(file: Path) -> Baseline:
    """Reads what `write_baseline` wrote.

    Raises:
        ConfigError: It cannot be read, has a key twice, or is no baseline somebody accepted.
    """
    try:
        baseline = Baseline.model_validate(read_canonical(file.read_bytes()))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}.", key=str(file)) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{file} is no baseline: {key}: {first['msg']}.", key=key) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is no baseline: {json_fault(error)}.", key=str(file)) from error
    if baseline.acceptance is None:
        raise ConfigError(
            f"{file} is a baseline nobody accepted; make one with `forge-harness baseline accept`.",
            key="acceptance",
        )
    return baseline


def machine_class(environment: Mapping[str, Any]) -> str | None:
    """Returns what two runs must share to be compared, or None when the record does not say.

    Of a run that was merged from machines of several classes it does not.
    """
    parts = [environment.get(key) for key in _MACHINE]
    return None if None in parts else "/".join(str(part) for part in parts)


def compared_facts(record: RunRecord) -> dict[str, str | None]:
    """Returns what two runs must have in common for their scores and values to compare, by name.

    None where the record does not say, which is like no other run.
    """
    return {
        "machine class": machine_class(record.environment),
        "policy": record.policy_digest,
        "subject": record.subject.spec,
        "profile": record.scope.profile.value,
        "selection": _selected(record),
        "declared": _declared(record),
    }


def changed_facts(
    ours: Mapping[str, str | None], theirs: Mapping[str, str | None]
) -> tuple[str, ...]:
    """Returns the names of the compared facts two runs do not have in common."""
    return tuple(name for name in ours if ours[name] is None or ours[name] != theirs[name])


def not_comparable(record: RunRecord, baseline: Baseline) -> str:
    """Returns why a run does not compare with a baseline, as a clause; empty when it does."""
    ours, theirs = compared_facts(record), baseline.facts
    for name in changed_facts(ours, theirs):
        if record.shards and ours[name] is None:
            return "the run was merged from machines of several classes"
        if ours[name] is None or theirs[name] is None:
            return "a run does not say what machine it measured on"
        return _REFUSALS[name].format(ours=ours[name], theirs=theirs[name])
    if baseline.state != "finished":
        return f"the baseline is {baseline.state}, not finished"
    accepted = baseline.acceptance
    # By the run's own day, so that the answer can be recomputed.
    day = judged_on(record.started_at, record.shards)
    if accepted is not None and accepted.expires and day > accepted.expires:
        return f"the baseline expired on {accepted.expires}; accept a new one"
    return ""


def _selected(record: RunRecord) -> str:
    scope = record.scope
    if scope.shard:
        return f"shard {scope.shard}"
    return ", ".join(sorted({*scope.suites, *scope.checks})) or "the whole profile"


def _declared(record: RunRecord) -> str:
    return (
        ", ".join(f"{key} = {value}" for key, value in sorted(record.declared.items())) or "nothing"
    )
