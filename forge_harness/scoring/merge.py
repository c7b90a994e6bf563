"""Merging: the runs of several CI jobs as one run over the whole profile.

A pure function of the merged records, so that `verify` merges again and compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from forge_harness.errors import UsageError
from forge_harness.policy import Policy
from forge_harness.record import RunRecord, ShardRecord, moment
from forge_harness.scoring.assembly import (
    SELECTING,
    RunContext,
    RunState,
    Scope,
    assemble,
    items_of,
    without_options,
)

_SOFTWARE = ("git_commit", "git_dirty", "python", "implementation", "packages")
"""Of the environment: what must be the same for the checks to be about one thing."""
_WORST_LAST: tuple[RunState, ...] = ("finished", "interrupted", "aborted")


@dataclass(frozen=True, slots=True)
class MergeSource:
    """One run to be merged."""

    name: str
    """What messages call it: the directory."""
    record: RunRecord
    digest: str
    """Of its run.json, "sha256:..."."""


def shard_file(place: int) -> str:
    """Returns where a merged run keeps the run.json of its source at `place`, from 0."""
    return f"shards/{place + 1}/run.json"


def in_order(sources: Sequence[MergeSource]) -> list[MergeSource]:
    """Returns the sources in an order of their own, whatever the order they were given in."""
    return sorted(sources, key=lambda source: (_index(source.record.scope.shard), source.digest))


def missing_shards(record: RunRecord) -> list[str]:
    """Returns which shards a merged run lacks, "3/3" each; none where it was cut otherwise."""
    given = {source.scope.shard for source in record.shards}
    count = max(int(shard.partition("/")[2] or 0) for shard in given)
    return [shard for i in range(count) if (shard := f"{i + 1}/{count}") not in given]


def _index(shard: str) -> int:
    return int(shard.partition("/")[0] or 0)


def merge_records(policy: Policy, sources: Sequence[MergeSource]) -> RunRecord:
    """Returns one record over the whole profile from the runs of its parts.

    Score and verdict are those of a run that had measured all of it at once. A check no source
    ran is not measured; of one that several ran the worse outcome counts, so that running a part
    again hides nothing.

    Args:
        policy: What all of them were scored with.
        sources: Finished, verified runs of one subject, commit, policy, profile and seed; the
            machines may differ.

    Raises:
        UsageError: The runs do not belong together.
    """
    sources = in_order(sources)
    _refuse_strangers(policy, sources)
    records = [source.record for source in sources]
    first = records[0]
    state, reason = _state(records)
    context = RunContext(
        run_id=_run_id(sources),
        subject=first.subject,
        environment=_shared([record.environment for record in records]),
        declared=first.declared,
        seed=first.seed,
        command=without_options(first.command, SELECTING),
        started_at=min((record.started_at for record in records), key=moment),
        finished_at=max(
            (record.finished_at or record.started_at for record in records), key=moment
        ),
        shards=[_shard(place, source) for place, source in enumerate(sources)],
        # Logs and studies stay beside the records of the shards, which have their digests.
        files=None if any(record.files is None for record in records) else {},
    )
    return assemble(
        policy,
        [item for record in records for item in items_of(record)],
        waivers=first.waivers,
        scope=Scope(profile=first.scope.profile),
        context=context,
        state=state,
        state_reason=reason,
    )


def _shard(place: int, source: MergeSource) -> ShardRecord:
    record = source.record
    return ShardRecord(
        file=shard_file(place),
        digest=source.digest,
        run_id=record.run_id,
        scope=record.scope,
        # A run that still goes on is refused before.
        state=cast("Any", record.state),
        command=record.command,
        environment=record.environment,
        started_at=record.started_at,
        finished_at=record.finished_at,
    )


def _run_id(sources: Sequence[MergeSource]) -> str:
    """Returns an id that the sources give: merged again it is the same run."""
    started = min(source.record.started_at for source in sources)
    stamp = started.translate(str.maketrans("", "", "-:"))
    joined = "\n".join(source.digest for source in sources)
    return f"{stamp}-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"


def _state(records: Sequence[RunRecord]) -> tuple[RunState, str]:
    worst = max((record.state for record in records), key=_WORST_LAST.index)
    reasons = [
        f"shard {record.scope.shard or record.run_id} is {record.state}"
        + (f": {record.state_reason}" if record.state_reason else "")
        for record in records
        if record.state != "finished"
    ]
    return worst, "; ".join(reasons)


def _shared(environments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, *others = environments
    return {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in others)
    }


def _refuse_strangers(policy: Policy, sources: Sequence[MergeSource]) -> None:
    """Raises for runs that are no parts of one run."""
    if not sources:
        raise UsageError("No run to merge; expected the directories of its shards.")
    first = sources[0]
    if first.record.policy_digest != policy.digest:
        raise UsageError(f"{first.name} was scored with another policy than {policy.digest}.")
    ids: dict[str, str] = {}
    for source in sources:
        record = source.record
        if record.state == "running":
            raise UsageError(f"{source.name} did not finish; leave it out, or run it again.")
        if record.shards:
            raise UsageError(
                f"{source.name} is merged already; merge all shards of a run in one go."
            )
        if record.run_id in ids:
            raise UsageError(
                f"{ids[record.run_id]} and {source.name} are the same run {record.run_id}; give "
                "each shard once."
            )
        ids[record.run_id] = source.name
        _refuse_another_run(first, source)


def _refuse_another_run(first: MergeSource, source: MergeSource) -> None:
    for what, read in _TRAITS.items():
        ours, theirs = read(first.record), read(source.record)
        if ours != theirs:
            raise UsageError(
                f"{first.name} and {source.name} are not parts of one run: {what} "
                f"{ours} and {theirs}; merge runs of one commit, subject, policy and profile."
            )
    for key in _SOFTWARE:
        a, b = first.record.environment.get(key), source.record.environment.get(key)
        if a != b:
            raise UsageError(
                f"{first.name} and {source.name} did not measure the same software: {key} "
                f"{_differing(a, b)}; run all shards from one commit and one installation."
            )


def _differing(a: object, b: object) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        name = min(key for key in {*a, *b} if a.get(key) != b.get(key))
        return f"{name} {a.get(name)} and {b.get(name)}"
    return f"{a} and {b}"


_TRAITS: dict[str, Callable[[RunRecord], object]] = {
    "policy": lambda record: record.policy_digest,
    "subject": lambda record: record.subject.spec,
    "digest of the subject's file": lambda record: record.subject.digest,
    "capabilities of the subject": lambda record: record.subject.capabilities,
    "profile": lambda record: record.scope.profile.value,
    "number of shards": lambda record: record.scope.shard.partition("/")[2] or "none",
    "seed": lambda record: record.seed,
    "declared": lambda record: record.declared,
    "waivers": lambda record: [waiver.model_dump() for waiver in record.waivers],
}
