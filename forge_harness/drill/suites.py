"""Measures the suites: seeds defects and runs the checks that must see them."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from forge_harness.config import HarnessConfig
from forge_harness.drill.defect import Benign, Defect
from forge_harness.drill.kills import (
    RED,
    UNREACHED,
    DefectResult,
    Found,
    Status,
    SuitesReport,
    VariantResult,
    judged,
)
from forge_harness.drill.seeds import Seeds, load_seeds
from forge_harness.drill.workers import Ended, side_by_side
from forge_harness.environment import collect_environment
from forge_harness.errors import UsageError, nearest, unknown_choice
from forge_harness.integration.pipeline_validator import PipelineValidator
from forge_harness.integration.quality_study import usable_cores
from forge_harness.integration.recording import utc_now
from forge_harness.policy import CatalogueEntry, Policy, load_policy
from forge_harness.types import Outcome, Profile

TIMEOUT_S = 900.0
"""Longest time of one subject: the slowest check of the quick profile takes 25 s on two cores."""
REFERENCE = "reference"
_STUDY = "MeasuresQuality"
_PRELOAD = (
    "torch",
    "forge_harness.plugin",
    "forge_harness._pytest.inprocess",
    "forge_harness.subject.reference",
    "forge_harness.drill.defects",
    "forge_harness.drill.observe",
)

Tell = Callable[[int, int, str], None]
"""Told (subjects drilled, subjects in all, the last one)."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which defects are seeded; empty tuples leave nothing out."""

    stages: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    matrix: bool = False
    """Run every check of the suite, and not only the one that must see the defect."""
    variants: bool = True
    """Run the checks over the sound variants as well."""
    sample: int | None = None
    """Defects of each stage, drawn by the seed; all when None."""


@dataclass(frozen=True, slots=True)
class Own:
    """What of a drill is the user's own."""

    seeds: str | None = None
    """Module or file of seeds, as `load_seeds` takes it; the shipped ones when None."""
    subject: str | None = None
    """What the seeds must differ from, and for which checks must be green; the reference."""
    suite_paths: tuple[Path, ...] = ()
    """Directories of checks beside the shipped ones."""


@dataclass(frozen=True, slots=True)
class _Task:
    name: str
    checks: tuple[str, ...]
    defect: bool
    profile: str = ""
    seed: int = 0
    own: Own = Own()


def selected(selection: Selection, seed: int = 0, seeds: Seeds | None = None) -> list[Defect]:
    """Returns the defects of a selection; the seed decides only which of them a sample holds.

    Raises:
        UsageError: A name is unknown, or nothing is left.
    """
    every = list((seeds or load_seeds()).defects.values())
    defects = every
    for what, given, attribute in (
        ("stage", selection.stages, lambda d: str(d.stage)),
        ("suite", selection.suites, lambda d: d.check.partition(".")[0]),
        ("check", selection.checks, lambda d: d.check),
        ("defect", selection.ids, lambda d: d.id),
    ):
        known = {attribute(defect) for defect in every}
        for name in given:
            if name not in known:
                raise UsageError(_unknown(what, name, known))
        if given:
            defects = [defect for defect in defects if attribute(defect) in given]
    if not defects:
        raise UsageError("No seeded defect is in all of the selections; give fewer.")
    return defects if selection.sample is None else _drawn(defects, selection.sample, seed)


def _drawn(defects: Sequence[Defect], size: int, seed: int) -> list[Defect]:
    """Returns so many of each stage, in the order they had."""
    kept: set[str] = set()
    for stage in dict.fromkeys(defect.stage for defect in defects):
        names = [defect.id for defect in defects if defect.stage is stage]
        # A generator a stage: what is drawn of one does not change with the size of another.
        kept |= set(Random(f"{seed} {stage}").sample(names, min(size, len(names))))
    return [defect for defect in defects if defect.id in kept]


def _unknown(what: str, name: str, known: set[str]) -> str:
    if what != "defect":
        return unknown_choice(f"{what} of seeded defects", name, known)
    close = nearest(name, known)
    hint = f" Did you mean {close!r}?" if close else ""
    return f"No seeded defect is called {name!r}.{hint} `drill suites --list` shows all."


def run_suites(
    selection: Selection | None = None,
    *,
    own: Own | None = None,
    profile: str = "quick",
    seed: int = 0,
    jobs: int | None = None,
    tell: Tell | None = None,
    stopped: Callable[[SuitesReport], object] = lambda report: None,
) -> SuitesReport:
    """Seeds the defects of a selection, one process each, and judges what the checks said.

    Args:
        selection: Which defects; all when None.
        own: Seeds, subject and checks of the user's own.
        profile: Profile of the measurements.
        seed: Seed of the measurements, and of a sample.
        jobs: Processes at a time; the number of usable cores when None.
        tell: Told of each subject that was drilled.
        stopped: Given what was found so far where the drill is interrupted, or cannot go on.

    Raises:
        UsageError: The selection names what is not there, a seed names a check that is not, or
            a subject is given without seeds of it.
        SubjectError: The user's seeds or subject cannot be loaded.
    """
    chosen, own = selection or Selection(), own or Own()
    if own.subject is not None and own.seeds is None:
        raise UsageError(
            f"Subject {own.subject!r} has no seeds: the shipped ones are seeded in the reference "
            "subject. Give seeds of your own with --seeds."
        )
    seeds = load_seeds(own.seeds)
    defects = selected(chosen, seed, seeds)
    policy = _policy(own, profile)
    _refuse_unknown_checks(defects, policy)
    scope = policy.in_scope(Profile(profile))
    started_at, started = utc_now(), time.monotonic()
    own = replace(own, seeds=None if own.seeds is None else seeds.where)
    tasks = [
        replace(task, profile=profile, seed=seed, own=own)
        for task in _tasks(defects, chosen, scope, seeds)
    ]
    ended: list[Ended] = []

    def report() -> SuitesReport:
        found = _whole(ended, tasks)
        return SuitesReport(
            defects=_rows(defects, tasks, found, _sound(found, tasks), seeds),
            variants=_variants(tasks, found, seeds),
            profile=profile,
            seed=seed,
            policy_digest=policy.digest,
            # The commit of the harness: the seeds and the checks are its own.
            environment=collect_environment(Path(__file__).parent),
            started_at=started_at,
            finished_at=utc_now(),
            seconds=time.monotonic() - started,
        )

    try:
        _drill_all(tasks, jobs or usable_cores(), tell, ended)
    except BaseException:  # An interrupt above all, when it may have run for a quarter of an hour.
        if ended:
            stopped(report())
        raise
    return report()


def _policy(own: Own, profile: str) -> Policy:
    """Returns the policy with the user's checks in it; loads the user's subject once."""
    if own.subject is None and not own.suite_paths:
        return load_policy()
    return PipelineValidator(
        subject_spec=own.subject, profile=Profile(profile), suite_paths=own.suite_paths
    ).policy


def _refuse_unknown_checks(defects: Sequence[Defect], policy: Policy) -> None:
    for defect in defects:
        if defect.check not in policy.by_id:
            raise UsageError(
                f"Seeded defect {defect.id!r}: "
                + unknown_choice("check", defect.check, policy.by_id).partition(" Valid: ")[0]
                + " Give the directory of your own checks with --suite-path."
            )


def _drill_all(tasks: Sequence[_Task], jobs: int, tell: Tell | None, ended: list[Ended]) -> None:
    for one in side_by_side(drill, tasks, jobs=jobs, timeout_s=TIMEOUT_S, preload=_PRELOAD):
        ended.append(one)
        if tell is not None:
            tell(len(ended), len(tasks), tasks[one.index].name)


def _whole(ended: Sequence[Ended], tasks: Sequence[_Task]) -> list[Ended]:
    """Returns how each task ended, in order; where a stopped drill has nothing, it says so."""
    there = {one.index: one for one in ended}
    return [there.get(i) or Ended(i, None, UNREACHED, 0.0) for i in range(len(tasks))]


def _tasks(
    defects: Sequence[Defect],
    selection: Selection,
    scope: Sequence[CatalogueEntry],
    seeds: Seeds,
) -> list[_Task]:
    """Returns what is run: the reference a suite at a time, sound variants, then the defects."""
    there = {entry.id for entry in scope}
    # A check of the study trains 42 models, for each defect again.
    cheap = [entry.id for entry in scope if _STUDY not in entry.requires]
    wanted = {defect.id: _checks_for(defect, cheap, selection) for defect in defects}
    every = sorted({check for checks in wanted.values() for check in checks} & there)
    suites = sorted({check.partition(".")[0] for check in every})

    def task(name: str, checks: Sequence[str], defect: bool = False) -> _Task:
        return _Task(name, tuple(checks), defect)

    tasks = [task(REFERENCE, [c for c in every if c.startswith(f"{s}.")]) for s in suites]
    if selection.variants:
        for kind in seeds.benign.values():
            checks = [check for check in every if _is_for(kind, check)]
            tasks += [task(kind.id, checks)] if checks else []
    return tasks + [task(d.id, [c for c in wanted[d.id] if c in there], True) for d in defects]


def _checks_for(defect: Defect, cheap: Sequence[str], selection: Selection) -> list[str]:
    if not selection.matrix:
        return [defect.check]
    suite = defect.check.partition(".")[0]
    return [defect.check, *(c for c in cheap if c.startswith(f"{suite}.") and c != defect.check)]


def _is_for(kind: Benign, check: str) -> bool:
    if check in kind.but:
        return False
    return check in kind.checks or check.partition(".")[0] in kind.checks


def drill(task: _Task) -> dict[str, Any]:
    """Runs one subject's checks in this process, which is not used for anything else.

    Returns:
        `found`: check -> (outcome, reason); of a defect also `reference` and `seeded`, digests of
        what the two subjects do.
    """
    import torch

    from forge_harness._pytest.inprocess import run_checks
    from forge_harness.drill.observe import fingerprint
    from forge_harness.subject.loader import load_subject

    seeds = load_seeds(task.own.seeds)
    torch.set_num_threads(1)
    answer: dict[str, Any] = {"found": {}}
    if task.defect:
        defect = seeds.defects[task.name]
        answer["reference"] = fingerprint(defect.alive, load_subject(task.own.subject).subject)
        answer["seeded"] = fingerprint(defect.alive, defect.subject())
    if task.checks:
        is_sound = task.name == REFERENCE
        runs = run_checks(
            task.checks,
            task.own.subject if is_sound else seeds.subject_of(task.name),
            profile=task.profile,
            seed=task.seed,
            paths=task.own.suite_paths,
            # What a project declares of its own subject says nothing of the shipped seeds.
            config=HarnessConfig() if task.own == Own() else None,
        )
        answer["found"] = {name: (run.outcome.value, run.reason) for name, run in runs.items()}
    return answer


def _found(one: Ended) -> dict[str, Found]:
    pairs = {} if one.value is None else one.value["found"]
    return {check: Found(Outcome(outcome), reason) for check, (outcome, reason) in pairs.items()}


def _sound(ended: Sequence[Ended], tasks: Sequence[_Task]) -> dict[str, Found]:
    sound: dict[str, Found] = {}
    for one in ended:
        if tasks[one.index].name == REFERENCE:
            sound |= _found(one)
    return sound


def _rows(
    defects: Sequence[Defect],
    tasks: Sequence[_Task],
    ended: Sequence[Ended],
    sound: Mapping[str, Found],
    seeds: Seeds,
) -> list[DefectResult]:
    by_name = {tasks[one.index].name: one for one in ended if tasks[one.index].defect}
    rows = []
    for defect in defects:
        one = by_name[defect.id]
        found = _found(one)
        value = one.value or {"reference": "", "seeded": ""}
        status, reason = _status(defect, one, found, sound)
        rows.append(
            DefectResult(
                **{name: getattr(defect, name) for name in ("id", "title", "source", "subtlety")},
                stage=str(defect.stage),
                check=defect.check,
                status=status,
                reason=reason,
                outcomes={check: entry.outcome.value for check, entry in found.items()},
                command=_command(tasks[one.index], defect, seeds),
                reference=value["reference"],
                seeded=value["seeded"],
                seconds=round(one.seconds, 3),
            )
        )
    return rows


def _status(
    defect: Defect, one: Ended, found: Mapping[str, Found], sound: Mapping[str, Found]
) -> tuple[Status, str]:
    if one.problem == UNREACHED:
        return Status.NOT_MEASURED, UNREACHED
    if one.value is None:
        return Status.CRASHED, f"The process of the drill: {one.problem}."
    if not one.value["reference"].startswith("sha256:"):
        return Status.NOT_MEASURED, (
            f"What shows it alive {one.value['reference']} for the subject it is seeded in."
        )
    if one.value["reference"] == one.value["seeded"]:
        return Status.EQUIVALENT, "What it does is what the reference subject does."
    return judged(defect, found, sound)


def _command(task: _Task, defect: Defect, seeds: Seeds) -> str:
    words = ["forge-harness", "run", "--subject", seeds.subject_of(defect.id)]
    words += [word for path in task.own.suite_paths for word in ("--suite-path", str(path))]
    # What a check draws, and how much, goes by these.
    words += ["--profile", task.profile] if task.profile != Profile.QUICK else []
    words += ["--seed", str(task.seed)] if task.seed else []
    return shlex.join([*words, "--check", defect.check])


def _variants(tasks: Sequence[_Task], ended: Sequence[Ended], seeds: Seeds) -> list[VariantResult]:
    rows: list[VariantResult] = []
    for one in ended:
        task = tasks[one.index]
        if task.defect:
            continue
        found = _found(one)
        missing = [check for check in task.checks if check not in found]
        problem = one.problem or (f"no record of {', '.join(missing)}" if missing else "")
        kind = seeds.benign.get(task.name)
        rows.append(
            VariantResult(
                id=task.name,
                title=kind.title if kind else task.own.subject or "The reference subject",
                outcomes={check: entry.outcome.value for check, entry in found.items()},
                alarms={c: entry.reason for c, entry in found.items() if entry.outcome in RED},
                problem=problem,
                seconds=round(one.seconds, 3),
            )
        )
    return rows
