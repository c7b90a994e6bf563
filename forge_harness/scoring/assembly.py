"""Builds the run record: one pure function from items and policy to everything a report shows."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from fractions import Fraction
from math import floor
from typing import Any, Literal, Protocol

from forge_harness.policy import CatalogueEntry, Policy
from forge_harness.record import (
    CheckItem,
    CheckRecord,
    ItemRecord,
    RunRecord,
    ScopeRecord,
    ScoreRecord,
    ShardRecord,
    SubjectRecord,
    SuiteRecord,
    Waiver,
    moment,
)
from forge_harness.scoring.derived import derived_items, without_derived
from forge_harness.scoring.rollup import RolledUp, roll_up, unique
from forge_harness.scoring.score import Score, SuiteScore, credit_of, score
from forge_harness.scoring.verdict import decide
from forge_harness.sums import sum_in_order
from forge_harness.types import Outcome, Profile

_FILE_OPTIONS = ("--suite-path", "--policy", "--waivers", "--config", "-c")
"""Of `forge-harness run`: without them a check may be unknown, or judged by another limit."""
_OF_A_SESSION = (
    *("--forge-run-dir", "--forge-suite", "--forge-check", "--forge-shard"),
    *("-n", "--numprocesses", "--dist"),
    *("--basetemp", "--junitxml", "--junit-xml"),
)
"""Options of pytest that one check does without: a run is the same with and without workers."""

SELECTING = ("--suite", "--check", "--shard", "--run-dir", *_OF_A_SESSION)
"""Options that say which part of a run, and where it is kept."""

RunState = Literal["running", "finished", "interrupted", "aborted"]


class ScopeLike(Protocol):
    """What a run set out to measure: `Scope`, or a `ScopeRecord` read back."""

    @property
    def profile(self) -> Profile:
        """The profile."""
        ...

    @property
    def suites(self) -> Sequence[str]:
        """Selected suites; with `checks` empty too: the whole profile."""
        ...

    @property
    def checks(self) -> Sequence[str]:
        """Selected check ids."""
        ...

    @property
    def shard(self) -> str:
        """Which shard of the profile `checks` are, "2/3"; empty where they are a selection."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a run sets out to measure."""

    profile: Profile = Profile.QUICK
    suites: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    shard: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What a run record says besides its items."""

    run_id: str
    subject: SubjectRecord
    environment: Mapping[str, Any] = field(default_factory=dict)
    declared: Mapping[str, str] = field(default_factory=dict)
    """Configuration values that not-applicable predicates read."""
    seed: int = 0
    command: Sequence[str] = ()
    started_at: str
    """ISO 8601; see `judged_on`."""
    finished_at: str | None = None
    shards: Sequence[ShardRecord] = ()
    """The runs it was merged from."""
    files: Mapping[str, str] | None = None
    """Path -> digest of what it left besides items and evidence; None where nobody noted it."""


def judged_on(started_at: str, shards: Sequence[ShardRecord]) -> str:
    """Returns the day, ISO 8601 and of UTC, that decides which waivers and baselines are live.

    That of the start, so that a score can be recomputed; of a merged run that of the last shard,
    or running one part again would be excused by the day of the others.
    """
    starts = [started_at, *(shard.started_at for shard in shards)]
    return max(map(moment, starts)).astimezone(UTC).date().isoformat()


def entries_in_scope(policy: Policy, scope: ScopeLike) -> tuple[CatalogueEntry, ...]:
    """Returns the entries a run covers, in catalogue order.

    With a selection: the profile's entries of the selected suites, and the checks named, whatever
    their profile.
    """
    if not scope.suites and not scope.checks:
        return policy.in_scope(scope.profile)
    return tuple(
        entry
        for entry in policy.catalogue
        if entry.id in scope.checks
        or (entry.suite in scope.suites and scope.profile in entry.profiles)
    )


def assemble(
    policy: Policy,
    items: Sequence[ItemRecord],
    *,
    waivers: Sequence[Waiver] = (),
    scope: ScopeLike,
    context: RunContext,
    state: RunState = "finished",
    state_reason: str = "",
) -> RunRecord:
    """Returns the record of a run: outcomes, score, coverage and verdict.

    A pure function: the same items in any order, from one process or from merged shards, give
    the same record. Nothing in scope is left out; a check without items is not measured.

    Args:
        policy: Catalogue, thresholds and weights.
        items: Every pytest item that belongs to a check.
        waivers: The waiver ledger in force.
        scope: The profile and the selection.
        context: Subject, environment and command of the run.
        state: Whether the run came to its end.
        state_reason: Why not, in one clause.
    """
    entries = entries_in_scope(policy, scope)
    items = without_derived(items)
    checks = _checks(policy, entries, items, waivers, scope, context)
    if derived := derived_items(policy, scope.profile, checks):
        items = [*items, *derived]
        checks = _checks(policy, entries, items, waivers, scope, context)
    known = {entry.id for entry in entries}
    unscored = unique(item for item in items if item.check not in known)
    scored = score(policy, [credit_of(check) for check in checks])
    verdict, reasons = decide(
        checks,
        unscored,
        scored,
        is_selection=bool(scope.suites or scope.checks),
        state=state,
        state_reason=state_reason,
        problems=[*waiver_problems(policy, waivers), *source_problems(context)],
    )
    return RunRecord(
        run_id=context.run_id,
        state=state,
        state_reason=state_reason,
        verdict=verdict,
        verdict_reasons=reasons,
        score=ScoreRecord(low=scored.low, high=scored.high),
        coverage=floored(scored.coverage),
        scope=_scope_record(policy, scope, entries),
        suites=[_suite_record(suite, checks) for suite in scored.suites],
        checks=checks,
        unscored_items=unscored,
        waivers=sorted(waivers, key=lambda w: w.model_dump_json()),
        policy_digest=policy.digest,
        subject=context.subject,
        environment=dict(context.environment),
        declared=dict(context.declared),
        seed=context.seed,
        command=list(context.command),
        started_at=context.started_at,
        finished_at=context.finished_at,
        shards=list(context.shards),
        files=None if context.files is None else dict(context.files),
    )


def waiver_problems(policy: Policy, waivers: Sequence[Waiver]) -> list[str]:
    """Returns one sentence a waiver that names no check of the catalogue."""
    unknown = sorted({waiver.check for waiver in waivers if waiver.check not in policy.by_id})
    return [f"a waiver names check {name!r}, which the catalogue does not have" for name in unknown]


def source_problems(context: RunContext) -> list[str]:
    """Returns a sentence where the shards of a merged run may have measured different sources.

    Equal commits say that they did not, unless files were changed since; without a commit the
    subject's digest covers its own file only. The reference is known by the package's version.
    """
    commit, changed = (context.environment.get(key) for key in ("git_commit", "git_dirty"))
    if len(context.shards) < 2 or (commit and changed is False):
        return []
    if commit is None and context.subject.spec == "reference":
        return []
    return [f"whether all shards measured the same source is not known: {_doubt(commit, changed)}"]


def _doubt(commit: str | None, changed: bool | None) -> str:
    if not commit:
        return "no commit says what it was"
    if changed is None:
        return "git did not say whether files were changed since its commit"
    return "files were changed since its commit"


def items_of(record: RunRecord) -> list[ItemRecord]:
    """Returns the items a record was assembled from, each with its evidence."""
    items = list(record.unscored_items)
    for check in record.checks:
        for item in check.items:
            own = [evidence for evidence in check.evidence if evidence.item == item.nodeid]
            items.append(
                ItemRecord(
                    nodeid=item.nodeid,
                    check=check.id,
                    outcome=item.outcome,
                    reason=item.reason,
                    duration_s=item.duration_s,
                    attempts=item.attempts,
                    evidence=own,
                    log=item.log,
                    warnings=item.warnings,
                )
            )
    return items


def context_of(record: RunRecord) -> RunContext:
    """Returns the context a record was assembled with."""
    return RunContext(
        run_id=record.run_id,
        subject=record.subject,
        environment=record.environment,
        declared=record.declared,
        seed=record.seed,
        command=record.command,
        started_at=record.started_at,
        finished_at=record.finished_at,
        shards=record.shards,
        files=record.files,
    )


def reassemble(
    record: RunRecord, policy: Policy, *, waivers: Sequence[Waiver] | None = None
) -> RunRecord:
    """Returns what the items and evidence of a record give under a policy.

    Trusts no derived value of `record`. `waivers` replaces the recorded ledger.
    """
    return assemble(
        policy,
        items_of(record),
        waivers=record.waivers if waivers is None else waivers,
        scope=record.scope,
        context=context_of(record),
        state=record.state,
        state_reason=record.state_reason,
    )


def floored(share: Fraction) -> float:
    """Floors a share of [0, 1] to four digits."""
    return floor(share * 10_000) / 10_000


def _checks(
    policy: Policy,
    entries: Sequence[CatalogueEntry],
    items: Sequence[ItemRecord],
    waivers: Sequence[Waiver],
    scope: ScopeLike,
    context: RunContext,
) -> list[CheckRecord]:
    by_check: dict[str, list[ItemRecord]] = {}
    for item in items:
        by_check.setdefault(item.check, []).append(item)
    capabilities = frozenset(context.subject.capabilities)
    today = judged_on(context.started_at, context.shards)
    return [
        _check_record(
            entry,
            roll_up(
                entry,
                by_check.get(entry.id, ()),
                ruled_out=entry.rules_out(capabilities, dict(context.declared)),
                waivers=[waiver for waiver in waivers if waiver.check == entry.id],
                today=today,
            ),
            _reproduce(entry.id, scope, context),
        )
        for entry in entries
    ]


def _reproduce(check: str, scope: ScopeLike, context: RunContext) -> str:
    if context.command[:1] == ["pytest"]:
        # Which of its arguments are the suites, only pytest knows.
        kept = without_options(context.command, _OF_A_SESSION)
        return shlex.join([*kept, "--forge-check", check])
    plain = reproduced_without_files(check, scope, context)
    return " ".join([plain, *map(shlex.quote, _files_named(context.command))])


def reproduced_without_files(check: str, scope: ScopeLike, context: RunContext) -> str:
    """Returns the command that reproduces a shipped check under the shipped policy.

    Recorded of every check by releases that did not name the files; their runs still verify.
    """
    words = ["forge-harness", "run", "--check", check, "--subject", context.subject.spec]
    words += ["--seed", str(context.seed)]
    if scope.profile is not Profile.QUICK:
        words += ["--profile", scope.profile.value]
    return shlex.join(words)


def without_options(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """Returns a command line without options that take a value."""
    kept: list[str] = []
    is_value = False
    for word in words:
        if not is_value and word.partition("=")[0] not in options:
            kept.append(word)
        is_value = not is_value and word in options
    return kept


def _files_named(words: Sequence[str]) -> list[str]:
    """Returns the options of a command line that decide which checks there are, and how judged."""
    kept: list[str] = []
    for place, word in enumerate(words):
        if word in _FILE_OPTIONS:
            kept += words[place : place + 2]
        elif word.partition("=")[0] in _FILE_OPTIONS:
            kept.append(word)
    return kept


def _check_record(entry: CatalogueEntry, rolled: RolledUp, command: str) -> CheckRecord:
    return CheckRecord(
        id=entry.id,
        title=entry.title,
        suite=entry.suite,
        component=entry.component,
        severity=entry.severity,
        version=entry.version,
        outcome=rolled.outcome,
        reason=rolled.reason,
        duration_s=sum_in_order(item.duration_s for item in rolled.items),
        credit_low=str(rolled.low),
        credit_high=str(rolled.high),
        command=command,
        items=[
            CheckItem(
                nodeid=item.nodeid,
                outcome=item.outcome,
                reason=item.reason,
                duration_s=item.duration_s,
                attempts=item.attempts,
                log=item.log,
                warnings=item.warnings,
            )
            for item in rolled.items
        ],
        evidence=[evidence for item in rolled.items for evidence in item.evidence],
    )


def _suite_record(suite: SuiteScore, checks: Sequence[CheckRecord]) -> SuiteRecord:
    own = [check for check in checks if check.suite == suite.name]
    counted = Counter(check.outcome for check in own)
    return SuiteRecord(
        name=suite.name,
        weight=suite.weight,
        low=floor(suite.low),
        high=floor(suite.high),
        coverage=floored(suite.coverage),
        counts={outcome.value: counted[outcome] for outcome in Outcome if counted[outcome]},
        duration_s=sum_in_order(check.duration_s for check in own),
    )


def _scope_record(
    policy: Policy, scope: ScopeLike, entries: Sequence[CatalogueEntry]
) -> ScopeRecord:
    return ScopeRecord(
        profile=scope.profile,
        suites=list(scope.suites),
        checks=list(scope.checks),
        shard=scope.shard,
        in_scope=len(entries),
        total=len(policy.catalogue),
    )


def score_of(record: RunRecord, policy: Policy) -> Score:
    """Returns the exact score of a record's checks."""
    return score(policy, [credit_of(check) for check in record.checks])
