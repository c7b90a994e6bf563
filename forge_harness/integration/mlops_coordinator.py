"""`MLOpsCoordinator` trains under a tracker and keeps a registry of what it trained.

    with MLOpsCoordinator(Path("mlops")) as coordinator:
        trained = coordinator.train("digits", TrainOptions(seed=1), Path("runs/digits"))
        version = coordinator.register(Path("exports/digits"), name="digits", run_id=trained.run_id)
        coordinator.promote("digits", version.version, alias="champion")
        coordinator.fetch("digits", "champion", Path("served"))

Tracking and registry are MLflow's, over SQLite, so its own interface shows them
(`mlflow ui --backend-store-uri sqlite:///mlops/mlflow.db`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from forge_harness import __version__
from forge_harness.canonical import canonical_json, tree_digest
from forge_harness.durable import staged_directory
from forge_harness.errors import (
    CheckpointError,
    DamagedCheckpointError,
    RegistryError,
    UsageError,
)
from forge_harness.formats.convert import check_outside
from forge_harness.formats.manifest import verify_manifest
from forge_harness.paths import resolved_path
from forge_harness.training.interruption import TrainingInterrupted
from forge_harness.training.runner import train_to_directory

from .experiments import MetricSummary, StepLog, Tracker, VersionState
from .readiness import gate_applies, present_fields

if TYPE_CHECKING:
    from forge_harness.integration.quality_coordinator import QualityCoordinator
    from forge_harness.protocols import TrainOptions

_DIGEST, _METRICS, _LINEAGE = "forge.digest", "forge.metrics", "forge.lineage"
_UNITS = "forge.units"
_PACKAGE = "package"


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A training run as the tracker has it.

    Attributes:
        run_id: Of the tracker.
        status: `FINISHED`, `FAILED`, `KILLED` or `RUNNING`.
        directory: What `forge-harness train` writes; "" for a run of another machine.
        metrics: Name -> held-out quality; empty while it runs.
        digest: `sha256:<hex>` of the packaged weights; "" without any.
    """

    run_id: str
    status: str
    directory: str
    metrics: Mapping[str, float]
    digest: str


@dataclass(frozen=True, slots=True)
class RegisteredVersion:
    """One version of a model in the registry.

    Attributes:
        name: Of the model.
        version: From 1.
        digest: `sha256:<hex>` over names and contents of its files.
        metrics: As `metrics.json` of the package states them.
        units: Metric -> unit, as stated there; "1" where it states none.
        lineage: As `lineage.json` states it.
        run_id: Run it was trained in; "" when not told.
        aliases: Names that point to it.
    """

    name: str
    version: int
    digest: str
    metrics: Mapping[str, Any]
    units: Mapping[str, str]
    lineage: Mapping[str, Any]
    run_id: str
    aliases: tuple[str, ...]


class MLOpsCoordinator:
    """Training automation, experiment tracking and the model registry.

    Args:
        root: Directory of database and artifacts; made when it is not there.
        quality: Decides what may be promoted, from the metrics of the version; None: the caller
            does.
        required: Gates without whose metric nothing is promoted; whatever they are, one gate at
            least must have been measured.
        classes: Whether a task tells classes apart, which have a limit of accuracy; None: unless
            the model is of a family of language models.

    Raises:
        UsageError: `required` is one text.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        quality: QualityCoordinator | None = None,
        required: Iterable[str] = ("accuracy",),
        classes: Callable[[str], bool] | None = None,
    ) -> None:
        if isinstance(required, str):
            raise UsageError(
                f"required is the text {required!r}; expected names of gates: ({required!r},)."
            )
        self.root = Path(root)
        self._tracker = Tracker(self.root)
        self._quality, self._required = quality, frozenset(required)
        self._classes = classes

    def __enter__(self) -> MLOpsCoordinator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the database."""
        self._tracker.close()

    def train(
        self,
        task: str,
        options: TrainOptions,
        out: Path,
        *,
        experiment: str = "forge",
        **parts: Any,  # noqa: ANN401 - the options of `train_to_directory`
    ) -> TrackedRun:
        """Trains into a directory, with options, every step and the held-out quality tracked.

        Args:
            task: `digits` or `bytes`, a variant allowed.
            options: Of the session.
            out: New directory, as for `forge-harness train`.
            experiment: What the run is listed under.
            parts: Further options of `forge_harness.training.train_to_directory`.

        Raises:
            ForgeError: Training failed; the run is recorded as such before it is raised.
        """
        stated = {"task": task, **asdict(options), "harness_version": __version__}
        run_id = self._tracker.begin(
            experiment, stated, {"forge.directory": str(resolved_path(out))}
        )
        log = StepLog(self._tracker, run_id)
        try:
            result = train_to_directory(task, out, options, on_step=log.add, **parts)
            digest = tree_digest(out / _PACKAGE) if (out / _PACKAGE).is_dir() else ""
            metrics = {key: value for key, value in result.items() if isinstance(value, float)}
            log.flush()
        except BaseException as error:
            killed = isinstance(error, TrainingInterrupted) or not isinstance(error, Exception)
            # Why the training ended matters more than that it could not be written down.
            with suppress(RegistryError):
                log.flush()
            with suppress(RegistryError):
                self._tracker.end(run_id, "KILLED" if killed else "FAILED", error=str(error))
            raise
        self._tracker.end(run_id, "FINISHED", metrics=metrics, tags={_DIGEST: digest})
        return self.run(run_id)

    def run(self, run_id: str) -> TrackedRun:
        """Returns a run.

        Raises:
            RegistryError: There is none of that id.
        """
        found = self._tracker.run(run_id)
        return TrackedRun(
            run_id=run_id,
            status=found.status,
            directory=found.tags.get("forge.directory", ""),
            metrics=found.final,
            digest=found.tags.get(_DIGEST, ""),
        )

    def monitor(self, run_id: str) -> Mapping[str, MetricSummary]:
        """Returns what the steps of a run reported: count, newest, mean, deviation, by name.

        Raises:
            RegistryError: There is none of that id.
        """
        return self._tracker.history(run_id)

    def register(self, package: Path, *, name: str, run_id: str = "") -> RegisteredVersion:
        """Copies an export package into the registry as the next version of a model.

        Args:
            package: Written by `Phase6Preparer.export` or `forge-harness export`.
            name: Of the model.
            run_id: Run it was trained in.

        Raises:
            DamagedCheckpointError: The package is not what its manifest says.
            CheckpointError: The registry lies inside the package.
            RegistryError: It states no metrics, one that has no value, or a number beyond what JSON
                has; or the registry does not take it.
        """
        check_outside(package, self.root)
        verify_manifest(package)
        fields = present_fields(package)
        metrics, units = _stated(package, fields.get("metrics.json", {}))
        try:
            tags = {
                _DIGEST: tree_digest(package),
                _METRICS: canonical_json(metrics).decode(),
                _UNITS: canonical_json(units).decode(),
                _LINEAGE: canonical_json(fields.get("lineage.json", {})).decode(),
            }
        except ValueError as error:
            raise RegistryError(
                f"Metrics or lineage of {str(package)!r} hold a number that not every reader has "
                f"({error}); export it again."
            ) from error
        return self.version(name, self._tracker.add_version(name, package, run_id, tags))

    def version(self, name: str, which: str | int) -> RegisteredVersion:
        """Returns a version by number or alias.

        Raises:
            RegistryError: There is none, or it was registered by something else; names what there
                is.
        """
        found = self._tracker.version(name, which)
        metrics, units, lineage = (_tag(name, found, tag) for tag in (_METRICS, _UNITS, _LINEAGE))
        return RegisteredVersion(
            name=name,
            version=found.number,
            digest=found.tags.get(_DIGEST, ""),
            metrics=metrics,
            units=units,
            lineage=lineage,
            run_id=found.run_id,
            aliases=found.aliases,
        )

    def promote(self, name: str, version: int, *, alias: str = "champion") -> RegisteredVersion:
        """Points an alias to a version, if it passes the required gates and all it has a metric of.

        Its files must be those that were registered. Of a gate that does not apply to the package
        (accuracy, where no classes are told apart) the metric must be there and has no limit.

        Raises:
            RegistryError: There is no such version, a gate fails, is not measured or has another
                unit than the metric, or the alias is no name; the alias stays where it is.
            DamagedCheckpointError: The stored files are not those that were registered.
            ConfigError: The policy does not have a required gate.
        """
        chosen = self.version(name, version)
        self._check_files(chosen, tree_digest(self._tracker.stored(name, chosen.version)))
        missed = None if self._quality is None else self._missed(self._quality, chosen)
        if missed:
            raise RegistryError(
                f"Version {version} of {name!r} is not promoted to {alias!r}: {missed}."
            )
        self._tracker.point(name, alias, chosen.version)
        return self.version(name, version)

    def _missed(self, quality: QualityCoordinator, chosen: RegisteredVersion) -> str:
        """Returns why a version passes no gate or misses one, "" when it passes."""
        stated = ", ".join(sorted(chosen.metrics))
        gates = self._required | (set(quality.gates()) & chosen.metrics.keys())
        if not gates:
            known = ", ".join(quality.gates())
            return f"none of its metrics ({stated}) is one of the gates ({known})"
        package = self._tracker.stored(chosen.name, chosen.version)
        task = chosen.lineage.get("task")
        for gate in sorted(gates):
            decided = quality.evaluate_gate(
                gate, chosen.metrics.get(gate), chosen.units.get(gate, "1")
            )
            if gate not in chosen.metrics:
                return f"gate {gate} is not measured: its metrics are {stated}; export it with it"
            limited = decided.value is None or gate_applies(gate, package, task, self._classes)
            if limited and not decided.passed:
                return f"gate {gate}: {decided.reason or 'not passed'}"
        return ""

    def _check_files(self, chosen: RegisteredVersion, digest: str) -> None:
        """Refuses files of another digest than those that were registered."""
        if digest != chosen.digest:
            raise DamagedCheckpointError(
                f"Version {chosen.version} of {chosen.name!r} is not what was registered: its "
                f"files no longer have digest {chosen.digest}; register it again."
            )

    def fetch(self, name: str, which: str | int, destination: Path) -> RegisteredVersion:
        """Copies a version's files into a new directory, verified; all of them or none.

        Raises:
            RegistryError: There is no such version, or its files are elsewhere.
            CheckpointError: The destination is in use, or cannot be written.
            DamagedCheckpointError: The stored files are not those that were registered.
        """
        found = self.version(name, which)
        source = self._tracker.stored(name, found.version)
        try:
            with staged_directory(destination) as stage:
                for file in sorted(path for path in source.rglob("*") if path.is_file()):
                    target = stage / file.relative_to(source)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
                self._check_files(found, tree_digest(stage))
        except FileExistsError as error:
            raise CheckpointError(f"{error}; name a new directory.") from error
        except OSError as error:
            raise CheckpointError(
                f"Cannot copy version {found.version} of {name!r} to {str(destination)!r}: "
                f"{error.strerror or error}. Nothing was written."
            ) from error
        return found


def _tag(name: str, found: VersionState, tag: str) -> dict[str, Any]:
    """Returns the JSON object in a tag of a version, {} without one; raises RegistryError."""
    text = found.tags.get(tag, "{}")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RegistryError(
            f"Version {found.number} of {name!r} has the tag {tag} {text!r:.80}, which is no JSON "
            "object; register its package again."
        )
    return value


def _stated(package: Path, entries: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns value and unit of each metric a package states; raises RegistryError."""
    if not entries:
        raise RegistryError(f"{str(package)!r} states no metrics; export it first.")
    metrics, units = {}, {}
    for name, entry in entries.items():
        given = entry if isinstance(entry, Mapping) else {"value": entry}
        if "value" not in given:
            raise RegistryError(
                f"{str(package)!r} states metric {name!r} without a value; export it again."
            )
        metrics[name], units[name] = given["value"], str(given.get("unit", "1"))
    return metrics, units
