"""Drill of a state store: crash campaigns, and seeded bugs that show the campaigns see anything."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from forge_harness.drill import (
    children,
    collection,
    contention,
    damage,
    limits,
    migration,
    power_cut,
    replay,
    strace,
    syscalls,
)
from forge_harness.drill.kills import UNREACHED
from forge_harness.drill.scenes import ADOPT, COLLECT, COMMIT, CREATE, LARGE, REPLACE
from forge_harness.drill.tally import (
    CampaignReport,
    Enough,
    NotMeasured,
    Status,
    Tally,
    not_measured,
)
from forge_harness.drill.target import OWN_STORE, opener_of
from forge_harness.errors import UsageError, unknown_choice
from forge_harness.paths import fixtures_dir

SCHEMA = "forge-drill-storage/1"

Step = Callable[[int, int, str], None]
Tell = Callable[[str, int, int, str], None]
"""Told campaign, done, total and what was done last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a campaign is given."""

    opener: str
    tally: Tally
    size: int
    """Most trials; 0 for all there are."""
    thorough: bool
    old_stores: Path | None
    tell: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """One kind of fault, put in many times."""

    name: str
    title: str
    run: Callable[[Trial], None]
    quick: int
    """Trials of a quick drill; 0 for all there are."""
    full: int


def _kill(trial: Trial) -> None:
    syscalls.strike_all(
        trial.tally,
        trial.opener,
        faults=[strace.KILL],
        scenes_=[CREATE, COMMIT, COLLECT, *([LARGE] if trial.thorough else [])],
        limit=trial.size,
        tell=trial.tell,
    )


def _errors(trial: Trial) -> None:
    syscalls.strike_all(
        trial.tally,
        trial.opener,
        faults=[strace.EIO, strace.ENOSPC, strace.EINTR, strace.FULL],
        scenes_=[CREATE, COMMIT, COLLECT] if trial.thorough else [COMMIT],
        limit=trial.size,
        tell=trial.tell,
    )


def _replay(trial: Trial) -> None:
    replay.cut_everywhere(
        trial.tally,
        trial.opener,
        scenes_=[ADOPT, REPLACE, CREATE, COMMIT, COLLECT],
        subsets=4 if trial.thorough else 1,
        limit=trial.size,
        tell=trial.tell,
    )


def _power_cut(trial: Trial) -> None:
    shapes = ("mixed", "small") if trial.thorough and trial.size > 1 else ("mixed",)
    for number, shape in enumerate(shapes):
        share = (trial.size + len(shapes) - 1 - number) // len(shapes)
        power_cut.cut_power(trial.tally, trial.opener, trials=share, shape=shape, tell=trial.tell)


def _bit_flips(trial: Trial) -> None:
    damage.flip_bits(trial.tally, trial.opener, trials=trial.size, tell=trial.tell)


def _swaps(trial: Trial) -> None:
    damage.swap_files(trial.tally, trial.opener, limit=trial.size, tell=trial.tell)


def _disk_full(trial: Trial) -> None:
    count = trial.size or CAMPAIGNS[trial.tally.name].full
    sizes = sorted({40 + 960 * index // count for index in range(count)})
    limits.fill_disks(trial.tally, trial.opener, kibibytes=sizes, tell=trial.tell)


def _file_limit(trial: Trial) -> None:
    edges = [1, 512, 1000, 4096, 20_000, 32_768, 33_000, 40_000, 65_536, 69_999, 70_000, 100_000]
    chosen = syscalls.sample([*edges, 200_000, 400_000], trial.size, trial.tally.seed)
    limits.limit_files(trial.tally, trial.opener, limits=chosen, tell=trial.tell)


def _writers(trial: Trial) -> None:
    contention.kill_writers(trial.tally, trial.opener, trials=trial.size, tell=trial.tell)


def _collection(trial: Trial) -> None:
    collection.collect_between(trial.tally, trial.opener, schedules=trial.size, tell=trial.tell)


def _migration(trial: Trial) -> None:
    migration.migrate_all(
        trial.tally,
        trial.opener,
        trial.old_stores,
        faults=[strace.KILL, *([strace.EIO, strace.ENOSPC] if trial.thorough else [])],
        limit=trial.size,
        tell=trial.tell,
    )


def _newer_schema(trial: Trial) -> None:
    migration.refuse_newer(trial.tally, trial.opener, limit=trial.size, tell=trial.tell)


CAMPAIGNS: Mapping[str, Campaign] = {
    name: Campaign(name=name, title=title, run=run, quick=quick, full=full)
    for name, title, run, quick, full in (
        ("kill", "killed at each write-class system call", _kill, 24, 0),
        ("errors", "EIO, ENOSPC, EINTR and a disk that stays full at each call", _errors, 32, 0),
        ("replay", "power cut before each call, on a simulated disk", _replay, 160, 0),
        ("power_cut", "power cut of an ext4 on a loop device", _power_cut, 5, 50),
        ("bit_flips", "one bit flipped in contents, index or log", _bit_flips, 400, 4000),
        ("swaps", "files cut, zeroed, lengthened, aged, removed, swapped", _swaps, 80, 0),
        ("disk_full", "memory disks of every size", _disk_full, 6, 48),
        ("file_limit", "RLIMIT_FSIZE", _file_limit, 5, 0),
        ("writers", "two writers, both killed", _writers, 4, 60),
        ("collection", "garbage collection inside commits and reads", _collection, 2000, 10_000),
        ("migration", "old stores, struck while they migrate", _migration, 15, 0),
        ("newer_schema", "a store of a later release", _newer_schema, 0, 0),
    )
}
"""Name -> campaign, in the order they run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A store with one seeded bug, and the campaign that must find it."""

    name: str
    bug: str
    campaign: str
    trials: int = 0
    """Most trials; 0 for all there are."""

    @property
    def opener(self) -> str:
        """What opens it."""
        return f"forge_harness.drill.store_mutants:{self.name}"


MUTANTS: tuple[Mutant, ...] = tuple(
    Mutant(name=name, bug=bug, campaign=campaign, trials=trials)
    for name, bug, campaign, trials in (
        ("no_file_sync", "contents are not synced", "replay", 0),
        ("no_name_sync", "directories are not synced", "replay", 0),
        ("unsynced_index", "the index answers before it is on disk", "replay", 0),
        ("no_adopt_sync", "a file somebody left is not synced when it is taken over", "replay", 0),
        ("trusts_orphans", "a file somebody left is taken over unread", "replay", 0),
        ("index_first", "the index refers to contents before they are there", "kill", 0),
        ("in_place", "contents are written over in place", "kill", 0),
        ("early_answer", "a commit returns before it is made", "kill", 0),
        ("two_commits", "states of one commit are committed one by one", "kill", 0),
        ("retried_sync", "a sync that failed is tried again", "errors", 0),
        ("ignored_sync", "a sync that failed is ignored", "errors", 0),
        ("no_check", "contents are not compared with their digest", "bit_flips", 400),
        ("no_head", "what was acknowledged is known to the log alone", "swaps", 0),
        ("deletes_damaged", "damaged contents are deleted", "swaps", 0),
        ("collects_damaged", "a damaged history is collected by what is left of it", "swaps", 0),
        ("short_writes", "a write that took a part passes for whole", "file_limit", 0),
        ("no_lock", "writers do not exclude each other", "writers", 20),
        ("ignores_parent", "a commit overwrites one it was not based on", "writers", 1),
        ("no_grace", "collection takes contents of a commit being made", "collection", 2000),
        ("no_read_lock", "readers do not hold collections off", "collection", 2000),
        ("forgets_kept", "collection forgets generations to be kept", "collection", 2000),
        ("piecemeal_migration", "a migration is not one transaction", "migration", 0),
        ("no_backup", "a migration keeps no copy of the old index", "migration", 0),
        ("any_schema", "a newer schema is taken for the own one", "newer_schema", 0),
    )
)
"""The negative control: a campaign that finds none of these proves nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MutantReport:
    """Whether a seeded bug was found."""

    name: str
    bug: str
    campaign: str
    status: str
    """caught, survived or not measured."""
    reason: str
    """What the campaign found, or why it could not run."""
    trials: int

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageReport:
    """All campaigns of a drill, and its negative control."""

    opener: str
    seed: int
    profile: str
    started_at: str
    seconds: float
    campaigns: tuple[CampaignReport, ...]
    mutants: tuple[MutantReport, ...] = ()

    @property
    def status(self) -> Status:
        """The worst of all; a seeded bug that survives counts as not measured."""
        found = {report.status for report in self.campaigns}
        if Status.LOST in found:
            return Status.LOST
        survived = any(mutant.status != "caught" for mutant in self.mutants)
        return Status.NOT_MEASURED if Status.NOT_MEASURED in found or survived else Status.HELD

    @property
    def unreached(self) -> int:
        """Campaigns and seeded bugs that were still to come when it was stopped."""
        reasons = [row.reason for row in self.campaigns] + [row.reason for row in self.mutants]
        return reasons.count(UNREACHED)

    @property
    def mutants_caught(self) -> int:
        """Seeded bugs that were found."""
        return sum(mutant.status == "caught" for mutant in self.mutants)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {
            "schema_version": SCHEMA,
            "status": self.status.value,
            "is_complete": not self.unreached,
            "opener": self.opener,
            "seed": self.seed,
            "profile": self.profile,
            "started_at": self.started_at,
            "seconds": self.seconds,
            "environment": {"system": platform.platform(), "python": platform.python_version()},
            "campaigns": [report.to_json() for report in self.campaigns],
            "mutants": [report.to_json() for report in self.mutants],
            "mutants_caught": self.mutants_caught,
            "mutants_total": len(self.mutants),
        }


def shipped_old_stores() -> Path:
    """Returns the directory of the stores our earlier schemas left."""
    return fixtures_dir() / "state"


def run_campaign(
    name: str,
    opener: str = OWN_STORE,
    *,
    seed: int = 0,
    profile: str = "full",
    trials: int | None = None,
    old_stores: Path | None = None,
    stop_early: bool = False,
    tell: Step | None = None,
    stopped: Callable[[CampaignReport], object] = lambda report: None,
) -> CampaignReport:
    """Runs one campaign against a store.

    Args:
        name: One of `CAMPAIGNS`.
        opener: `module:attribute` that opens the store, importable in a fresh process.
        seed: Seed of every random choice.
        profile: "quick" for a sample, anything else for everything.
        trials: Most trials, in place of what the profile says.
        old_stores: Directory of old stores for `migration`.
        stop_early: End at the first thing that goes wrong.
        tell: Progress.
        stopped: Given what went wrong until then where it is interrupted, or cannot go on.

    Raises:
        UsageError: There is no campaign of that name, or the opener cannot be imported.
    """
    if name not in CAMPAIGNS:
        raise UsageError(unknown_choice("campaign", name, CAMPAIGNS))
    opener_of(opener)
    campaign, tally = CAMPAIGNS[name], Tally(name, seed, stop_early=stop_early)
    quick = profile == "quick"
    size = (campaign.quick if quick else campaign.full) if trials is None else trials
    started = time.perf_counter()
    try:
        if problem := children.problem_of(opener):
            raise NotMeasured(problem)
        campaign.run(
            Trial(
                opener=opener,
                tally=tally,
                size=size,
                thorough=not quick,
                old_stores=old_stores,
                tell=tell or _silent,
            )
        )
    except NotMeasured as error:
        if not tally.bad:
            return not_measured(name, seed, str(error))
    except Enough:
        pass
    except BaseException:
        # What held so far proves nothing of the rest; what was lost is lost.
        if tally.bad:
            stopped(tally.report(time.perf_counter() - started))
        raise
    return tally.report(time.perf_counter() - started)


def run_mutant(
    mutant: Mutant, *, seed: int = 0, old_stores: Path | None = None, tell: Step | None = None
) -> MutantReport:
    """Runs the campaign that must find a seeded bug, until it does."""
    report = run_campaign(
        mutant.campaign,
        mutant.opener,
        seed=seed,
        profile="quick",
        trials=mutant.trials,
        old_stores=old_stores,
        stop_early=True,
        tell=tell,
    )
    status = {Status.LOST: "caught", Status.HELD: "survived"}.get(report.status, "not measured")
    return _reported(mutant, status, report.reason, report.trials)


def _reported(mutant: Mutant, status: str, reason: str, trials: int = 0) -> MutantReport:
    return MutantReport(
        name=mutant.name,
        bug=mutant.bug,
        campaign=mutant.campaign,
        status=status,
        reason=reason,
        trials=trials,
    )


def run_storage(
    opener: str = OWN_STORE,
    *,
    campaigns: Sequence[str] = (),
    profile: str = "full",
    seed: int = 0,
    trials: int | None = None,
    mutants: Iterable[Mutant] = (),
    old_stores: Path | None = None,
    tell: Tell | None = None,
    stopped: Callable[[StorageReport], object] = lambda report: None,
) -> StorageReport:
    """Runs campaigns against a store, and the negative control against seeded bugs of ours.

    Args:
        opener: `module:attribute` that opens the store.
        campaigns: Names; all when empty.
        profile: As `run_campaign`.
        seed: Seed of every random choice.
        trials: Most trials of each campaign.
        mutants: Seeded bugs to find.
        old_stores: Directory of old stores; those of our earlier schemas when None.
        tell: Progress.
        stopped: Given what was found so far where the drill is interrupted, or cannot go on.

    Raises:
        UsageError: There is no campaign of that name, or the opener cannot be imported.
    """
    names = list(campaigns or CAMPAIGNS)
    for name in names:
        if name not in CAMPAIGNS:
            raise UsageError(unknown_choice("campaign", name, CAMPAIGNS))
    directory = shipped_old_stores() if old_stores is None else old_stores
    started, clock = datetime.now(UTC), time.perf_counter()
    bugs, reports, found = list(mutants), list[CampaignReport](), list[MutantReport]()

    def so_far() -> StorageReport:
        left = (not_measured(name, seed, UNREACHED) for name in names[len(reports) :])
        unseen = (_reported(mutant, "not measured", UNREACHED) for mutant in bugs[len(found) :])
        return StorageReport(
            opener=opener,
            seed=seed,
            profile=profile,
            started_at=started.isoformat(timespec="seconds"),
            seconds=time.perf_counter() - clock,
            campaigns=(*reports, *left),
            mutants=(*found, *unseen),
        )

    try:
        for name in names:
            one = run_campaign(
                name,
                opener,
                seed=seed,
                profile=profile,
                trials=trials,
                old_stores=directory,
                tell=_of(tell, name),
                stopped=reports.append,
            )
            reports.append(one)
        for mutant in bugs:
            own = _of(tell, f"bug {mutant.name}")
            found.append(run_mutant(mutant, seed=seed, old_stores=directory, tell=own))
    except BaseException:  # An interrupt above all, when it may have run for an hour.
        if reports:
            stopped(so_far())
        raise
    return so_far()


def _of(tell: Tell | None, name: str) -> Step | None:
    return None if tell is None else lambda done, total, label: tell(name, done, total, label)


def _silent(done: int, total: int, label: str) -> None:
    pass
