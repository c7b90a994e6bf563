"""Runs and model versions in MLflow, over SQLite in one directory; imported when first used.

MLflow 3.17: the file store is in maintenance mode, so a database it is; single metrics cost about
30 ms each, so they go in batches; the database's schema takes about 2 s of CPU when it is made.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from forge_harness.errors import RegistryError, unknown_choice

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

    from forge_harness.protocols import StepRecord

_BATCH = 1000
"""Most metrics MLflow takes at once."""
_FINAL = "final."
_PACKAGE = "package"
_LONGEST_TAG = 5000
"""Characters of a tag's value in MLflow's schema."""


@dataclass(frozen=True, slots=True)
class RunState:
    """A run: how it ended, its tags and its final metrics."""

    status: str
    tags: Mapping[str, str]
    final: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class MetricSummary:
    """One metric over the steps of a run.

    Attributes:
        count: Steps that reported it.
        last: The newest value.
        mean: Over all steps.
        deviation: Standard deviation over all steps, n - 1; 0 for a single one.
    """

    count: int
    last: float
    mean: float
    deviation: float


@dataclass(frozen=True, slots=True)
class VersionState:
    """A version of a registered model."""

    number: int
    run_id: str
    tags: Mapping[str, str]
    aliases: tuple[str, ...]


class Tracker:
    """Runs and registered models below one directory.

    Args:
        root: Made when something is first written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._opened: MlflowClient | None = None

    @property
    def uri(self) -> str:
        """Of the database, as MLflow takes it."""
        return f"sqlite:///{(self.root / 'mlflow.db').resolve()}"

    def close(self) -> None:
        """Gives up the connections to the database."""
        if self._opened is None:
            return
        # MLflow has no way to close a client; its stores keep their connections otherwise.
        opened: Any = self._opened
        for service in (opened._tracking_client, opened._get_registry_client()):
            engine = getattr(service.store, "engine", None)
            if engine is not None:
                engine.dispose()
        self._opened = None

    def begin(self, experiment: str, options: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Starts a run with its options; returns its id."""
        from mlflow.entities import Param, RunTag

        client = self._client()
        found = client.get_experiment_by_name(experiment)
        place = (self.root / "artifacts").resolve().as_uri()
        number = found.experiment_id if found else client.create_experiment(experiment, place)
        run_id: str = client.create_run(number).info.run_id
        params = [Param(key, str(value)) for key, value in sorted(options.items())]
        client.log_batch(run_id, (), params, [RunTag(key, value) for key, value in tags.items()])
        return run_id

    def log(self, run_id: str, rows: list[tuple[str, float, int, int]]) -> None:
        """Adds (name, value, milliseconds since 1970, step) rows."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, when, step) for name, value, when, step in rows]
        for start in range(0, len(metrics), _BATCH):
            self._client().log_batch(run_id, metrics[start : start + _BATCH])

    def end(
        self,
        run_id: str,
        status: str,
        *,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        error: str = "",
    ) -> None:
        """Ends a run."""
        client = self._client()
        for name, value in (metrics or {}).items():
            client.log_metric(run_id, f"{_FINAL}{name}", value)
        said = {"forge.error": error[:_LONGEST_TAG]} if error else {}
        for name, text in {**(tags or {}), **said}.items():
            client.set_tag(run_id, name, text)
        client.set_terminated(run_id, status)

    def run(self, run_id: str) -> RunState:
        """Returns a run.

        Raises:
            RegistryError: There is none of that id.
        """
        found = self._run(run_id)
        final = {
            name.removeprefix(_FINAL): value
            for name, value in found.data.metrics.items()
            if name.startswith(_FINAL)
        }
        return RunState(found.info.status, dict(found.data.tags), final)

    def history(self, run_id: str) -> dict[str, MetricSummary]:
        """Returns what the steps of a run reported.

        Raises:
            RegistryError: There is none of that id.
        """
        names = [n for n in self._run(run_id).data.metrics if not n.startswith(_FINAL)]
        client = self._client()
        return {
            name: _summary([metric.value for metric in client.get_metric_history(run_id, name)])
            for name in sorted(names)
        }

    def add_version(self, name: str, package: Path, run_id: str, tags: Mapping[str, str]) -> int:
        """Copies a directory into the registry as the next version; returns its number."""
        from mlflow.exceptions import MlflowException
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        client = self._client()
        if run_id:
            self._run(run_id)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise RegistryError(f"Model name {name!r} is refused: {error.message}") from error
        digest = tags["forge.digest"].partition(":")[2]
        place = (self.root / "models" / digest).resolve().as_uri()
        repository: Any = get_artifact_repository(place)
        repository.log_artifacts(str(package), _PACKAGE)
        version = client.create_model_version(
            name, f"{place}/{_PACKAGE}", run_id or None, tags=dict(tags)
        )
        return int(version.version)

    def version(self, name: str, which: str | int) -> VersionState:
        """Returns a version by number or alias.

        Raises:
            RegistryError: There is none; names what there is.
        """
        found = self._version(name, which)
        return VersionState(
            int(found.version), found.run_id or "", dict(found.tags), tuple(sorted(found.aliases))
        )

    def stored(self, name: str, number: int) -> Path:
        """Returns the directory a version's files are in."""
        source = urlparse(self._version(name, number).source)
        return Path(unquote(source.path))

    def point(self, name: str, alias: str, number: int) -> None:
        """Points an alias to a version."""
        self._client().set_registered_model_alias(name, alias, str(number))

    def _version(self, name: str, which: str | int) -> ModelVersion:
        from mlflow.exceptions import MlflowException

        client = self._client()
        try:
            if str(which).isdecimal():
                return client.get_model_version(name, str(which))
            return client.get_model_version_by_alias(name, str(which))
        except MlflowException as error:
            known = [model.name for model in client.search_registered_models()]
            if name not in known:
                raise RegistryError(unknown_choice("model", name, known)) from error
            aliases = client.get_registered_model(name).aliases
            versions = [v.version for v in client.search_model_versions(f"name='{name}'")]
            there = [*sorted(map(str, versions)), *aliases]
            raise RegistryError(
                unknown_choice(f"version of {name!r}", str(which), there)
            ) from error

    def _run(self, run_id: str) -> Any:  # noqa: ANN401 - an entity of MLflow
        from mlflow.exceptions import MlflowException

        try:
            return self._client().get_run(run_id)
        except MlflowException as error:
            raise RegistryError(f"There is no run {run_id!r} in {str(self.root)!r}.") from error

    def _client(self) -> MlflowClient:
        if self._opened is None:
            # Read when it is imported; nothing about a training is anybody else's business.
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            from mlflow.tracking import MlflowClient

            # It tells of every table it makes.
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
            self.root.mkdir(parents=True, exist_ok=True)
            self._opened = MlflowClient(self.uri, registry_uri=self.uri)
        return self._opened


class StepLog:
    """Gathers what steps report, and hands it over in batches.

    Args:
        tracker: Where to.
        run_id: Of the run.
    """

    def __init__(self, tracker: Tracker, run_id: str) -> None:
        self._tracker, self._run_id = tracker, run_id
        self._rows: list[tuple[str, float, int, int]] = []

    def add(self, record: StepRecord, total: int) -> None:
        """Takes one step; a signature of `train_to_directory`'s `on_step`."""
        import time

        now = int(time.time() * 1000)
        for name in ("loss", "learning_rate", "grad_norm", "seconds"):
            value = float(getattr(record, name))
            if math.isfinite(value):
                self._rows.append((name, value, now, record.step))
        if len(self._rows) >= _BATCH - 4:
            self.flush()

    def flush(self) -> None:
        """Hands over what is left."""
        rows, self._rows = self._rows, []
        if rows:
            self._tracker.log(self._run_id, rows)


def _summary(values: list[float]) -> MetricSummary:
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    deviation = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0
    return MetricSummary(len(values), values[-1], mean, deviation)
