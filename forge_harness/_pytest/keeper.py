"""Records a run that was started with pytest itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from forge_harness._pytest.state import ForgeState
from forge_harness.errors import ForgeError
from forge_harness.integration.recording import FinalState, Recording, new_context
from forge_harness.paths import resolved_path, suites_dir
from forge_harness.record import ItemRecord, RunRecord, SubjectRecord
from forge_harness.scoring import Scope
from forge_harness.types import Profile


class Keeper:
    """Scores the session's items and keeps the run where `--forge-run-dir` says."""

    def __init__(self, state: ForgeState) -> None:
        self._state = state
        self._given: dict[str, list[ItemRecord]] = {}
        self.path = state.options.run_dir
        self.record: RunRecord | None = None
        self.recording = Recording(
            policy=state.policy,
            scope=self._announced_scope(),
            context=new_context(
                subject=SubjectRecord(spec=state.subject_spec, name="", capabilities=[]),
                declared=state.declared,
                seed=state.seed,
                command=["pytest", *map(str, state.config.invocation_params.args)],
            ),
            waivers=state.waivers,
        )

    @property
    def disk_full(self) -> str | None:
        """The sentence, once the run directory has taken no more."""
        return self.recording.disk_full

    def start(self) -> None:
        """Makes the run directory.

        Raises:
            RunDirectoryError: It holds something, or cannot be written to.
        """
        if self.path is not None:
            self.recording.start(self.path)

    def add(self, item: ItemRecord) -> None:
        """Keeps an item; one that ran more than once (xdist's each) with each of its results."""
        given = self._given.setdefault(item.nodeid, [])
        if item not in given:
            given.append(item)
            self.recording.add(item)

    def finish(self, state: FinalState, reason: str = "") -> None:
        """Scores the run; writes record, reports and manifest where the run is kept.

        Raises:
            RunDirectoryError: The run directory takes no record.
        """
        self.recording.policy = self._state.policy
        self.recording.scope = self._scope()
        self.recording.context = replace(self.recording.context, subject=self._subject())
        self.record = self.recording.finish(state, reason)
        if self.path is not None:
            from forge_harness.finish import finish_run

            finish_run(self.path, self.record, self.recording.policy)

    def _announced_scope(self) -> Scope:
        """Returns the scope as far as it is known before collection, which adds to the policy."""
        if self._state.shard is None:
            return self._scope()
        return Scope(profile=Profile(self._state.profile), shard=str(self._state.shard))

    def _scope(self) -> Scope:
        options = self._state.options
        profile = Profile(self._state.profile)
        if self._state.shard is not None:
            # In the order of the catalogue: a set has none.
            own = self._state.shard_checks
            checks = tuple(e.id for e in self._state.policy.catalogue if e.id in own)
            return Scope(profile=profile, checks=checks, shard=str(self._state.shard))
        suites = options.suites
        if not suites and not options.checks and not self._covers_shipped_suites():
            # `pytest my_checks` asks for that directory: a selection of its suites, never PASS.
            found = {mark.check.partition(".")[0] for mark in self._state.marks.values()}
            entries = {e.id: e.suite for e in self._state.policy.catalogue}
            named = {entries.get(mark.check) for mark in self._state.marks.values()} - {None}
            suites = tuple(sorted({str(suite) for suite in named} or found))
        return Scope(profile=profile, suites=suites, checks=options.checks)

    def _covers_shipped_suites(self) -> bool:
        config = self._state.config
        shipped = resolved_path(suites_dir())
        given = [str(argument).partition("::")[0] for argument in config.args]
        paths = [resolved_path(config.invocation_params.dir / path) for path in given]
        is_given = any(path == shipped or path in shipped.parents for path in paths)
        return is_given and not any(map(self._is_ignored, _files_and_directories(shipped)))

    def _is_ignored(self, path: Path) -> bool:
        """Asks whom pytest asks: `--ignore`, `--ignore-glob`, `collect_ignore` and plugins."""
        config = self._state.config
        return bool(config.hook.pytest_ignore_collect(collection_path=path, config=config))

    def _subject(self) -> SubjectRecord:
        known = self._state.published_subject()
        if known is None:
            # No check needed the subject; its name still belongs to the record.
            try:
                _ = self._state.loaded
            except ForgeError:
                return SubjectRecord(spec=self._state.subject_spec, name="", capabilities=[])
            known = self._state.published_subject()
        return SubjectRecord.model_validate(known)


def _files_and_directories(suites: Path) -> set[Path]:
    """Returns the test files below a directory, and the directories that lead to them."""
    files = set(suites.rglob("test_*.py"))
    parents = {parent for file in files for parent in file.parents}
    return files | {path for path in parents if path.is_relative_to(suites)}


def shown(path: Path) -> str:
    """Returns a path as the user would type it."""
    try:
        return str(resolved_path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)
