"""Runs checks against a subject in this process: for tests and for drills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from forge_harness.errors import NothingCollectedError
from forge_harness.paths import suites_dir
from forge_harness.selection import shipped_files
from forge_harness.types import Outcome

if TYPE_CHECKING:
    from forge_harness.config import HarnessConfig
    from forge_harness.record import ItemRecord
    from forge_harness.subject.loader import LoadedSubject
    from forge_harness.subject.protocols import MeasuresQuality, QualityRun

WORST_FIRST = (
    Outcome.ERROR,
    Outcome.FAIL,
    Outcome.NOT_MEASURED,
    Outcome.FLAKY,
    Outcome.WARN,
    Outcome.PASS,
    Outcome.NOT_APPLICABLE,
)

# Nested in another pytest session: what that session already does is left to it, and plugins
# of the environment are left out (they cost about 0.3 s a session). The two it needs are handed
# over as modules: looking for their names reads the metadata of all that is installed.
_PLUGINS = ("forge_harness.plugin", "pytest_timeout")
_NESTED = (
    "--disable-plugin-autoload",
    *("-p", "no:faulthandler", "-p", "no:unraisableexception", "-p", "no:threadexception"),
    *("--capture=no", "--no-header", "--no-summary", "-q"),
)


# By identity: pytest 9.0 keeps plugins in a set.
@dataclass(slots=True, eq=False)
class Handover:
    """Plugin object that hands a subject over to a pytest session and takes the records back."""

    subject: object | None
    config: HarnessConfig | None = None
    study: Sequence[QualityRun] | None = None
    spec: str | None = None
    """What is loaded where no subject is handed over; the reference pipeline when None."""
    records: list[ItemRecord] = field(default_factory=list)

    def loaded(self) -> LoadedSubject | None:
        """Returns the subject as a loader would, or None for one that has to be loaded."""
        if self.subject is None:
            return None
        from forge_harness.subject.loader import LoadedSubject
        from forge_harness.subject.protocols import capabilities_of

        kind = type(self.subject)
        name = str(getattr(self.subject, "name", kind.__name__))
        spec = f"{kind.__module__}:{kind.__qualname__}"
        return LoadedSubject(self.subject, spec, name, capabilities_of(self.subject), None)

    def quality_study(self, profile: str) -> list[QualityRun]:
        """Returns the study given, or trains it here, one run after the other."""
        if self.study is None:
            subject = self.subject
            if subject is None:
                from forge_harness.subject.loader import load_subject

                subject = load_subject(self.spec).subject
            trainer = cast("MeasuresQuality", subject)
            plan = trainer.quality_plan(profile)
            self.study = [run for step in plan for run in trainer.quality_run(*step, profile)]
        return list(self.study)


@dataclass(frozen=True, slots=True)
class CheckRun:
    """How one check ended: the worst of its items, before severity and waivers."""

    outcome: Outcome
    reason: str
    items: list[ItemRecord]

    def evidence(self, name: str) -> Any:  # noqa: ANN401 - an EvidenceRecord's value
        """Returns the value of the first evidence of that name.

        Raises:
            KeyError: No item recorded it.
        """
        for item in self.items:
            for record in item.evidence:
                if record.name == name:
                    return record.value
        raise KeyError(name)


def run_check(
    check: str,
    subject: object | None = None,
    *,
    config: HarnessConfig | None = None,
    profile: str = "quick",
    seed: int = 0,
    study: Sequence[QualityRun] | None = None,
    paths: Sequence[Path] | None = None,
    arguments: Sequence[str] = (),
) -> CheckRun:
    """Runs one check against a subject object and returns how it ended.

    Args:
        check: Check id.
        subject: Any object with the methods of the capabilities it offers; the reference
            subject when None.
        config: What the check's `forge_config` is; loaded as in a run when None.
        profile: Profile of the measurement.
        seed: Seed of the run.
        study: What the check's `quality_study` is; trained by the subject when None.
        paths: Where the check is; found in the shipped suites when None.
        arguments: More pytest arguments, for example `("-k", "digits")`.

    Raises:
        NothingCollectedError: No test carries the check id.
    """
    handover = Handover(subject, config, study)
    _session(handover, [check], profile, seed, paths, arguments)
    return _run_of(handover.records)


def run_checks(
    checks: Sequence[str],
    spec: str | None,
    *,
    profile: str = "quick",
    seed: int = 0,
    paths: Sequence[Path] = (),
    config: HarnessConfig | None = None,
) -> dict[str, CheckRun]:
    """Runs checks in one session against a subject that is loaded from `spec`, as a run does.

    Args:
        checks: Check ids of the shipped suites, or of `paths`.
        spec: As `load_subject` takes it; the reference subject when None, whatever the
            configuration names.
        profile: Profile of the measurements.
        seed: Seed of the run.
        paths: Where checks are beside the shipped suites.
        config: What the checks' `forge_config` is; loaded as in a run when None.

    Returns:
        How each ended, by its id. A check that left no record is not in it.

    Raises:
        NothingCollectedError: No test carries one of the ids.
    """
    handover = Handover(None, config, spec=spec)
    arguments = ("--forge-subject", spec or "reference")
    files = [*shipped_files(checks), *paths]
    _session(handover, checks, profile, seed, files, arguments)
    found: dict[str, list[ItemRecord]] = {}
    for record in handover.records:
        found.setdefault(record.check, []).append(record)
    return {check: _run_of(records) for check, records in found.items()}


def _session(
    handover: Handover,
    checks: Sequence[str],
    profile: str,
    seed: int,
    paths: Sequence[Path] | None,
    arguments: Sequence[str],
) -> None:
    files = [str(path) for path in (shipped_files(checks) if paths is None else paths)]
    options = [argument for check in checks for argument in ("--forge-check", check)]
    options += ["--forge-profile", profile, "--forge-seed", str(seed)]
    named = ", ".join(map(repr, checks))
    if not files:
        raise NothingCollectedError(f"Check {named} is not in the shipped suites; give paths.")
    ini = ("-c", str(suites_dir() / "pytest.ini"), "--rootdir", str(suites_dir()))
    plugins = [_named(handover), *map(import_module, _PLUGINS)]
    status = pytest.main([*ini, *_NESTED, *options, *arguments, *files], plugins=plugins)
    if not handover.records:
        raise NothingCollectedError(
            f"No test in {', '.join(files)} carries the check id {named} "
            f"(pytest ended with {status})."
        )


def _run_of(records: list[ItemRecord]) -> CheckRun:
    worst = min(records, key=lambda record: WORST_FIRST.index(record.outcome))
    return CheckRun(worst.outcome, worst.reason, records)


class _Registrar:
    """Registers the handover under its name before the plugin looks for it."""

    def __init__(self, handover: Handover) -> None:
        self._handover = handover

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        config.pluginmanager.register(self._handover, "forge_handover")


def _named(handover: Handover) -> _Registrar:
    return _Registrar(handover)
