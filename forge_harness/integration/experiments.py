"""Runs and model versions in MLflow, over SQLite in one directory; imported when first used.

MLflow 3.17: the file store is in maintenance mode, so a database it is; single metrics cost about
30 ms each, so they go in batches; the database's schema takes about 2 s of CPU when it is made.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from forge_harness.canonical import tree_digest
from forge_harness.durable import exclusive, staged_directory
from forge_harness.errors import DamagedCheckpointError, RegistryError, unknown_choice
from forge_harness.paths import resolved_path

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

    from forge_harness.protocols import StepRecord

_BATCH = 1000
"""Most metrics MLflow takes at once."""
_FINAL = "final."
_DATABASE, _MODELS, _PACKAGE = "mlflow.db", "models", "package"
_LONGEST_TAG = 5000
"""Characters of a tag's value in MLflow's schema."""
_LONGEST_VERSION_TAG = 100_000
"""The same of a tag of a model version."""
_UNKNOWN, _LOCKED = "RESOURCE_DOES_NOT_EXIST", "TEMPORARILY_UNAVAILABLE"
_LOCK_WAIT_S = 20


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
        """Of the database, as MLflow takes it.

        Raises:
            RegistryError: The path has a character that ends the name of a database there.
        """
        path = str(resolved_path(self.root / _DATABASE))
        if "?" in path:
            raise RegistryError(
                f"The directory {str(self.root)!r} has a '?' in its path, at which the name of a "
                "database would end; name another."
            )
        return f"sqlite:///{path}"

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
        """Starts a run with its options; returns its id.

        Raises:
            RegistryError: MLflow does not take the experiment: its name, or it was deleted.
        """
        from mlflow.entities import Param, RunTag

        client = self._client()
        params = [Param(key, str(value)) for key, value in sorted(options.items())]
        with _refusals(f"Experiment {experiment!r}"):
            run_id: str = client.create_run(self._experiment(experiment)).info.run_id
            client.log_batch(run_id, (), params, [RunTag(k, value) for k, value in tags.items()])
        return run_id

    def log(self, run_id: str, rows: list[tuple[str, float, int, int]]) -> None:
        """Adds (name, value, milliseconds since 1970, step) rows."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, when, step) for name, value, when, step in rows]
        with _refusals(f"What the steps of run {run_id!r} reported"):
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
        said = {"forge.error": error[:_LONGEST_TAG]} if error else {}
        with _refusals(f"The end of run {run_id!r}"):
            for name, value in (metrics or {}).items():
                client.log_metric(run_id, f"{_FINAL}{name}", value)
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
        with _refusals(f"The history of run {run_id!r}"):
            return {
                name: _summary([metric.value for metric in client.get_metric_history(run_id, name)])
                for name in sorted(names)
            }

    def add_version(self, name: str, package: Path, run_id: str, tags: Mapping[str, str]) -> int:
        """Copies a directory into the registry as the next version; returns its number.

        Args:
            name: Of the model.
            package: The directory.
            run_id: Run it was trained in; "" for none.
            tags: Of the version; `forge.digest` is that of the directory.

        Raises:
            RegistryError: MLflow does not take name or tags, there is no such run, or the files
                cannot be written.
            DamagedCheckpointError: The directory changed while it was copied.
        """
        from mlflow.exceptions import MlflowException

        for tag, value in tags.items():
            if len(value) > _LONGEST_VERSION_TAG:
                raise RegistryError(
                    f"{tag.removeprefix('forge.').capitalize()} of {str(package)!r} has "
                    f"{len(value):,} characters; a version keeps at most "
                    f"{_LONGEST_VERSION_TAG:,}. Shorten it, and export again."
                )
        client = self._client()
        if run_id:
            self._run(run_id)
        with _refusals(f"Model name {name!r}"):
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        place = self._keep(package, tags["forge.digest"])
        with _refusals(f"A version of {name!r}"):
            source = place.as_uri()
            version = client.create_model_version(name, source, run_id or None, tags=dict(tags))
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
        """Returns the directory a version's files are in.

        Raises:
            RegistryError: There is no such version, or its files are elsewhere.
        """
        source = self._version(name, number).source or ""
        place = urlparse(source)
        if place.scheme != "file":
            raise RegistryError(
                f"Version {number} of {name!r} has its files at {source!r}, where nothing was "
                "registered from here; fetch it with MLflow, or register its package."
            )
        return Path(unquote(place.path))

    def point(self, name: str, alias: str, number: int) -> None:
        """Points an alias to a version.

        Raises:
            RegistryError: It is no name of an alias.
        """
        if alias.isdecimal():
            raise RegistryError(
                f"Alias {alias!r} would be taken for the number of a version; expected a name."
            )
        with _refusals(f"Alias {alias!r}"):
            self._client().set_registered_model_alias(name, alias, str(number))

    def _experiment(self, name: str) -> str:
        """Returns the number of an experiment, made when it is not there."""
        from mlflow.exceptions import MlflowException

        client = self._client()
        found = client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            place = resolved_path(self.root / "artifacts").as_uri()
            return str(client.create_experiment(name, place))
        except MlflowException as error:
            # Another process may have made it meanwhile.
            found = client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
            return str(found.experiment_id)

    def _keep(self, package: Path, digest: str) -> Path:
        """Returns where files of this digest are kept, whole; copies them unless they are there.

        Versions of one content share its files: nothing is written over what another version has,
        and a copy that was damaged gives way to a sound one.
        """
        place = resolved_path(self.root / _MODELS / digest.partition(":")[2] / _PACKAGE)
        try:
            with exclusive(self.root / _MODELS):
                if place.is_dir() and tree_digest(place) == digest:
                    return place
                with staged_directory(place, replace=True) as stage:
                    shutil.copytree(package, stage, dirs_exist_ok=True)
                    if tree_digest(stage) != digest:
                        raise DamagedCheckpointError(
                            f"{str(package)!r} changed while it was copied; register it again.",
                            path=str(package),
                        )
        except OSError as error:
            raise RegistryError(
                f"Cannot store {str(package)!r} in {str(self.root)!r}: {error.strerror or error}. "
                "Nothing was registered."
            ) from error
        return place

    def _version(self, name: str, which: str | int) -> ModelVersion:
        from mlflow.exceptions import MlflowException

        client = self._client()
        try:
            if str(which).isdecimal():
                return client.get_model_version(name, str(which))
            return client.get_model_version_by_alias(name, str(which))
        except MlflowException as error:
            with _refusals(f"Version {which!r} of {name!r}"):
                if error.error_code == _LOCKED:
                    raise
                raise self._no_version(name, which) from error

    def _no_version(self, name: str, which: str | int) -> RegistryError:
        """Returns the error that names what there is; raises what MLflow does over a store."""
        from mlflow.exceptions import MlflowException

        client = self._client()
        try:
            aliases = client.get_registered_model(name).aliases
        except MlflowException as error:
            if error.error_code != _UNKNOWN:
                raise
            known = [model.name for model in client.search_registered_models()]
            return RegistryError(unknown_choice("model", name, known))
        there = [*self._numbers(name), *aliases]
        return RegistryError(unknown_choice(f"version of {name!r}", str(which), there))

    def _numbers(self, name: str) -> list[str]:
        """The versions of a model; none of a name that MLflow's filters cannot express."""
        from mlflow.exceptions import MlflowException

        quote = '"' if "'" in name else "'"
        try:
            found = self._client().search_model_versions(f"name={quote}{name}{quote}")
        except MlflowException:
            return []
        return sorted((str(version.version) for version in found), key=int)

    def _run(self, run_id: str) -> Any:  # noqa: ANN401 - an entity of MLflow
        from mlflow.exceptions import MlflowException

        client = self._client()
        with _refusals(f"Run {run_id!r}"):
            try:
                return client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != _UNKNOWN:
                    raise
                raise RegistryError(f"There is no run {run_id!r} in {str(self.root)!r}.") from error

    def _client(self) -> MlflowClient:
        if self._opened is None:
            # Read when it is imported; nothing about a training is anybody else's business.
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            from mlflow.tracking import MlflowClient

            # It tells of every table it makes, and of every error, which is raised as well.
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
            uri = self.uri
            # MLflow makes the tables when they are first asked for; two processes that both do
            # spoil each other's.
            with _opening(self.root), exclusive(self.root / _DATABASE):
                _ask(resolved_path(self.root / _DATABASE))
                opened = MlflowClient(uri, registry_uri=uri)
                opened.search_experiments(max_results=1)
                opened.search_registered_models(max_results=1)
            self._opened = opened
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


@contextmanager
def _opening(root: Path) -> Iterator[None]:
    """Turns what a database does not allow, or another MLflow wrote, into an error of ours."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (OSError, sqlite3.Error, MlflowException, SQLAlchemyError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise RegistryError(
            f"The registry in {str(root)!r} cannot be opened ({why}); name another directory, put "
            "back a sound copy, or, where another MLflow wrote it, open it with that one."
        ) from error


def _ask(database: Path) -> None:
    """Reads from a database that is there: MLflow asks one it cannot open for 100 s."""
    if database.exists():
        with closing(sqlite3.connect(database, timeout=_LOCK_WAIT_S)) as opened:
            opened.execute("SELECT name FROM sqlite_master").fetchall()


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turns what MLflow does not take into an error of ours."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        # What SQLAlchemy adds below it, the statement, is of no use to whoever asked.
        why = str(error.message).partition("\n")[0]
        raise RegistryError(f"{what} is refused: {why}") from error


def _summary(values: list[float]) -> MetricSummary:
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    deviation = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0
    return MetricSummary(len(values), values[-1], mean, deviation)
