"""PipelineValidator: runs the suites over a subject and records the evidence."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from forge_harness.canonical import canonical_json
from forge_harness.errors import NothingCollectedError, SubjectError, UsageError
from forge_harness.imports import python_program
from forge_harness.integration.check_stage import CheckStage, pytest_command
from forge_harness.integration.child import Child, Log, describe_status
from forge_harness.integration.pipeline_child import PROGRESS, write_error
from forge_harness.integration.pytest_events import Events
from forge_harness.integration.recording import FinalState, Recording, new_context, utc_now
from forge_harness.integration.stops import interrupted_once, uninterrupted
from forge_harness.paths import resolved_path, suites_dir
from forge_harness.policy import CatalogueEntry, Policy
from forge_harness.record import ItemRecord, RunRecord, SubjectRecord, Waiver
from forge_harness.rundir import check_is_free
from forge_harness.scoring import Scope
from forge_harness.selection import (
    build_policy,
    catalogues_beside,
    inline_from,
    refuse_suites_without_checks,
    refuse_unread_names,
    select,
    shipped_files,
    with_catalogues,
    with_inline,
)
from forge_harness.sharding import STUDY_CAPABILITY, Shard, shard_of
from forge_harness.types import Outcome, Profile

SUBJECT_TIMEOUT_S = 300.0
"""Longest time importing the subject may take; torch alone took 13 s on a loaded machine."""
COLLECT_TIMEOUT_S = 120.0
_CHILD = (*python_program("forge_harness.integration.pipeline_child"),)
_POLL_S = 0.1
_COLLECTED = (0, 5)
"""Exit statuses of a pytest that looked at every file: with tests in them, and without."""
_USAGE_ERROR = 4
"""Exit status of a pytest that refuses the files it was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is."""

    stage: str
    """`study` or `checks`."""
    done: int
    total: int
    label: str
    """What ended last: a training run, or a check id."""
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do."""

    policy: Policy
    """With the catalogues and inline checks of the user's suites in it."""
    scope: Scope
    entries: tuple[CatalogueEntry, ...]
    """The checks in scope."""
    subject: SubjectRecord
    needs_study: bool
    """Whether models have to be trained before the checks run."""


ProgressCallback = Callable[[Progress], None]


class PipelineValidator:
    """Runs the suites over a subject, in processes of their own, and keeps what they measured.

    Args:
        policy: What the run is scored with; the shipped policy when None. Catalogues beside
            `suite_paths` and checks defined by their markers are added to it.
        subject_spec: As `load_subject` takes it; the reference pipeline when None.
        profile: Scope and size of the measurements.
        suites: Run these suites only.
        checks: Run these checks only.
        shard: Run this part of the profile only; not with `suites` or `checks`.
        seed: Seed of every random choice.
        workers: Processes that run checks side by side; 0 and 1 both mean one, apart from the
            one that collects, so that a crash costs one check.
        suite_paths: Directories of the user's own checks.
        timeout_s: Longest time the whole run may take, in seconds; None for no limit.
        check_timeout_s: Longest time one check may take; 0 leaves the catalogue's limits.
        waivers: Waivers in force.
        declared: Configuration values that not-applicable predicates read.
        config_file: Configuration the checks see as `forge_config`.
        command: How the run was started, for the record.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        subject_spec: str | None = None,
        *,
        profile: Profile = Profile.QUICK,
        suites: Sequence[str] = (),
        checks: Sequence[str] = (),
        shard: Shard | None = None,
        seed: int = 0,
        workers: int = 1,
        suite_paths: Sequence[Path] = (),
        timeout_s: float | None = None,
        check_timeout_s: float = 0.0,
        waivers: Sequence[Waiver] = (),
        declared: Mapping[str, str] | None = None,
        config_file: Path | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self._given_policy = policy
        self._subject_spec = subject_spec or "reference"
        self._scope = Scope(profile=profile, suites=tuple(suites), checks=tuple(checks))
        self._shard = shard
        self._seed = seed
        self._workers = max(1, workers)
        self._suite_paths = tuple(resolved_path(Path(path)) for path in suite_paths)
        self._timeout_s = timeout_s
        self._check_timeout_s = check_timeout_s
        self._waivers = tuple(waivers)
        self._declared = dict(declared or {})
        self._config_file = config_file
        self._command = list(sys.argv if command is None else command)
        self._plan: Plan | None = None
        self._gaps: list[str] = []

    def plan(self) -> Plan:
        """Returns what a run will do; loads the subject in a process of its own.

        Raises:
            UsageError: A suite or check has no such name, or is outside the profile; or the shard
                would be empty.
            ConfigError: A catalogue of the user's suites does not fit the schema.
            SubjectError: The subject cannot be loaded.
            NothingCollectedError: No check is in scope.
        """
        if self._plan is None:
            policy = self._whole_policy()
            scope = self._scope
            entries = self._select(policy)
            if not entries:
                raise NothingCollectedError("No check is in scope; widen --suite or --profile.")
            if self._shard is not None:
                entries = shard_of(entries, self._shard)
                checks = tuple(entry.id for entry in entries)
                scope = replace(scope, checks=checks, shard=str(self._shard))
            with interrupted_once():
                subject = self._probe_subject()
            needs_study = STUDY_CAPABILITY in subject.capabilities and any(
                STUDY_CAPABILITY in entry.requires for entry in entries
            )
            self._plan = Plan(
                policy=policy,
                scope=scope,
                entries=entries,
                subject=subject,
                needs_study=needs_study,
            )
        return self._plan

    def _select(self, policy: Policy) -> tuple[CatalogueEntry, ...]:
        scope = self._scope
        try:
            return select(policy, scope.profile, scope.suites, scope.checks)
        except UsageError as error:
            # A name may be unknown only because the file that defines it is broken, or skipped.
            if not self._gaps:
                raise
            raise UsageError(f"{error} {self._gaps[0]}.") from error

    @property
    def gaps(self) -> tuple[str, ...]:
        """What of the user's suites the plan does not know, a sentence each.

        Modules that cannot be imported, and those that skip themselves: whatever checks they
        define are not in the catalogue, so that nothing else would miss them.
        """
        self.plan()
        return tuple(self._gaps)

    @property
    def policy(self) -> Policy:
        """The policy the run is scored with."""
        return self.plan().policy

    def validate(self, run_dir: Path, progress: ProgressCallback | None = None) -> RunRecord:
        """Runs the plan and writes items and record into `run_dir`.

        The record is final, but the directory is not sealed: `forge_harness.finish.finish_run`
        adds the reports and the manifest. Ctrl-C, SIGTERM and SIGHUP end the run; what was
        measured by then is recorded with the state `interrupted`, whatever else arrives.

        Args:
            run_dir: Must not exist, or be empty.
            progress: Told of each training run and each pytest item that ended.

        Raises:
            RunDirectoryError: `run_dir` holds something, or takes no record.
            ForgeError: As `plan`, before anything is written.
        """
        check_is_free(run_dir)
        started_at = utc_now()
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        recording = self._recording(self.plan(), started_at)
        recording.start(resolved_path(run_dir))
        run = _Run(
            self, self.plan(), recording, resolved_path(run_dir), deadline, progress or _silent
        )
        with uninterrupted():
            return run.record()

    def _recording(self, plan: Plan, started_at: str) -> Recording:
        context = new_context(
            subject=plan.subject,
            declared=self._declared,
            seed=self._seed,
            command=self._command,
            started_at=started_at,
        )
        return Recording(plan.policy, plan.scope, context, self._waivers)

    def _whole_policy(self) -> Policy:
        catalogues = catalogues_beside(self._suite_paths)
        if self._given_policy is None:
            policy = build_policy(None, catalogues)
        else:
            policy = with_catalogues(self._given_policy, catalogues)
        if not self._suite_paths:
            refuse_unread_names(policy)
            return policy
        log = Log(None)
        uncollected: list[ItemRecord] = []
        with tempfile.TemporaryDirectory(prefix="forge-plan-") as directory:
            events = Events(Path(directory) / "events.jsonl", uncollected.append)
            options = ["--collect-only", "-q", "--forge-events", str(events.path)]
            # The widest scope: a path whose checks are all nightly is not empty.
            options += ["--forge-profile", Profile.NIGHTLY.value]
            command = pytest_command(self._suite_paths, *options)
            status = _run_to_end(command, log, COLLECT_TIMEOUT_S)
            events.read()
        if status == _USAGE_ERROR:
            raise UsageError(log.last_line().removeprefix("ERROR: "))
        policy = with_inline(policy, inline_from(events.marks.values()))
        # Nothing ran, so each check that was collected is told of too, as one that never did.
        lost = [item for item in uncollected if item.nodeid not in events.marks]
        self._gaps = [f"{item.nodeid} {item.reason}" for item in lost]
        if events.finished is None:
            ended = "timed out" if status is None else describe_status(status)
            self._gaps.append(f"pytest ended while collecting ({ended}): {log.last_line()}")
        elif events.finished["error"] is not None:
            self._gaps.append(f"pytest broke down while collecting: {events.finished['error']}")
        # What cannot be imported shows in the run itself, with its traceback. Until it can, or
        # while a module skips itself, nobody knows which names it would define.
        if status in _COLLECTED and not self._gaps:
            refuse_suites_without_checks(self._suite_paths, events.marks)
            refuse_unread_names(policy)
        return policy

    def _probe_subject(self) -> SubjectRecord:
        with tempfile.TemporaryDirectory(prefix="forge-subject-") as directory:
            out = Path(directory) / "subject.json"
            log = Log(None)
            command = [*_CHILD, "probe", self._subject_spec, str(out)]
            limit_s = min(SUBJECT_TIMEOUT_S, self._timeout_s or SUBJECT_TIMEOUT_S)
            status = _run_to_end(command, log, limit_s)
            if status is None and limit_s < SUBJECT_TIMEOUT_S:
                raise SubjectError(
                    f"Subject {self._subject_spec!r} was not loaded within the {limit_s:g} s that "
                    "the whole run may take; give it more (--deadline, run.deadline_s), or 0 for "
                    "no limit."
                )
            if status is None:
                raise SubjectError(
                    f"Subject {self._subject_spec!r} was not loaded within {limit_s:g} s; its "
                    "module must end when it is imported, without training or waiting."
                )
            if not out.is_file():
                said = log.last_line() or "it said nothing"
                raise SubjectError(
                    f"Loading subject {self._subject_spec!r} ended its process "
                    f"({describe_status(status)}): {said}"
                )
            answer = json.loads(out.read_text(encoding="utf-8"))
        if "error" in answer:
            raise SubjectError(str(answer["error"]))
        return SubjectRecord.model_validate(answer)

    def pytest_options(self, plan: Plan, run_dir: Path, work: Path) -> list[str]:
        """Returns the options of the pytest process that runs a plan.

        Args:
            plan: What is run.
            run_dir: Where artifacts of evidence go.
            work: Directory of files only the two processes share.
        """
        # Written whole, so that the process scores nothing by a policy of its own.
        policy_file = work / "policy.json"
        policy_file.write_bytes(canonical_json(plan.policy.to_json()))
        options = ["-n", str(self._workers), "--dist", "worksteal", "--tb=short"]
        options += ["--continue-on-collection-errors", "--forge-events", str(work / "events.jsonl")]
        options += ["--forge-run-dir", str(run_dir), "--forge-policy", str(policy_file)]
        options += ["--forge-profile", plan.scope.profile, "--forge-subject", plan.subject.spec]
        options += ["--forge-seed", str(self._seed)]
        options += ["--forge-timeout", str(self._check_timeout_s)]
        if self._config_file is not None:
            options += ["--forge-config", str(self._config_file)]
        for suite in plan.scope.suites:
            options += ["--forge-suite", suite]
        if plan.scope.shard:
            # Not by its checks: what belongs to none of the catalogue is for one shard to report.
            return [*options, "--forge-shard", plan.scope.shard]
        for check in plan.scope.checks:
            options += ["--forge-check", check]
        return options

    def paths(self, plan: Plan) -> list[Path]:
        """Returns where the checks of a plan are: shipped suites, then the user's."""
        narrowed = bool(plan.scope.suites or plan.scope.checks)
        ids = [entry.id for entry in plan.entries]
        return [*(shipped_files(ids) if narrowed else [suites_dir()]), *self._suite_paths]

    @property
    def workers(self) -> int:
        """Processes that run checks side by side."""
        return self._workers

    @property
    def check_timeout_s(self) -> float:
        """Longest time one check may take, in seconds; 0 leaves the catalogue's limits."""
        return self._check_timeout_s


@dataclass(slots=True)
class _Run:
    """One execution of a plan."""

    validator: PipelineValidator
    plan: Plan
    recording: Recording
    run_dir: Path
    deadline: float | None
    progress: ProgressCallback

    def record(self) -> RunRecord:
        state: FinalState = "finished"
        with tempfile.TemporaryDirectory(prefix="forge-run-") as work:
            try:
                with interrupted_once():
                    problem = self._stages(Path(work))
                state = "aborted" if problem else "finished"
            except KeyboardInterrupt:
                state, problem = "interrupted", "stopped by the user"
        return self.recording.finish(state, problem)

    def _stages(self, work: Path) -> str:
        options = self.validator.pytest_options(self.plan, self.run_dir, work)
        if self.plan.needs_study:
            study = self._study(work)
            if self._time_is_up():
                return "the run's time was up while the models of the quality study were trained"
            options += ["--forge-study", str(study)]
        timeout = self.validator.check_timeout_s
        limits = {entry.id: timeout or entry.timeout_s for entry in self.plan.entries}
        done = 0

        def on_item(item: ItemRecord) -> None:
            nonlocal done
            done += 1
            self.recording.add(item)
            total = max(done, stage.reader.total())
            told = Progress(
                stage="checks", done=done, total=total, label=item.check, outcome=item.outcome
            )
            self.progress(told)

        stage = CheckStage(
            command=pytest_command(self.validator.paths(self.plan), *options),
            events=work / "events.jsonl",
            log=self.run_dir / "logs" / "pytest.log",
            limits=limits,
            deadline=self.deadline,
            on_item=on_item,
            stop=lambda: self.recording.disk_full,
        )
        return stage.run().problem

    def _study(self, work: Path) -> Path:
        """Trains the study; a study that failed is a file that says why, for its checks."""
        out = self.run_dir / "study.json"
        log = Log(self.run_dir / "logs" / "study.log")
        spec, scope = self.plan.subject.spec, self.plan.scope
        command = [*_CHILD, "study", spec, str(out), scope.profile, str(self.validator.workers)]
        limit = self._study_limit()
        ends = time.monotonic() + limit
        with Child(command, log) as child:
            status = None
            while status is None and not self._time_is_up() and time.monotonic() < ends:
                status = child.pump(_POLL_S)
                self._tell_study(log)
        if not out.is_file():
            out = work / "study.json"
            reason = f"its process ended ({describe_status(status or 0)}): {log.last_line()}"
            write_error(out, f"timed out after {limit:g} s" if status is None else reason)
        return out

    def _study_limit(self) -> float:
        """Returns how long the study may take: as long as a check that waits for it."""
        waiting = [e.timeout_s for e in self.plan.entries if STUDY_CAPABILITY in e.requires]
        return self.validator.check_timeout_s or max(waiting)

    def _tell_study(self, log: Log) -> None:
        for line in log.take_lines():
            if line.startswith(PROGRESS):
                label, done, total = json.loads(line.removeprefix(PROGRESS))
                self.progress(Progress(stage="study", done=done, total=total, label=label))

    def _time_is_up(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def _run_to_end(command: Sequence[str], log: Log, timeout_s: float) -> int | None:
    """Returns the exit status, or None when the time was up and the process was ended."""
    deadline = time.monotonic() + timeout_s
    with Child(command, log) as child:
        status = None
        while status is None and time.monotonic() < deadline:
            status = child.pump(_POLL_S)
    return status


def _silent(progress: Progress) -> None:
    pass
