"""Where a run begins: a new directory, weights from elsewhere, or the checkpoint it resumes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from torch import Tensor

from forge_harness.durable import remove_partials
from forge_harness.errors import UsageError
from forge_harness.formats import ModelDescription
from forge_harness.formats.detect import detect
from forge_harness.paths import resolved_path
from forge_harness.protocols import TrainOptions
from forge_harness.state import Sealer
from forge_harness.training.checkpoint import (
    LONGEST_REASON,
    CheckpointError,
    has_session_header,
    resume_session,
    saved_model,
)
from forge_harness.training.ingredients import BuildModel
from forge_harness.training.keeping import (
    KeepsCheckpoints,
    StateCheckpoints,
)
from forge_harness.training.model_record import recorded_builder
from forge_harness.training.ranks import Ranks
from forge_harness.training.run_directory import (
    CHECKPOINTS,
    OPTIONS,
    OnNote,
    TrainingDirectory,
)
from forge_harness.training.session import QATSession
from forge_harness.training.start import TASK_OF, read_start, require_fit


def begin_run(
    directory: TrainingDirectory, keeper: KeepsCheckpoints, state: Path | None, ranks: Ranks
) -> None:
    """Refuses a place a new run cannot be made in; for rank 0 alone.

    Raises:
        UsageError: The directory is in use, the store and it lie within each other, or the store
            cannot keep what the ranks write.
        CheckpointError: The store has checkpoints of another run.
    """
    _refuse_in_use(directory.path)
    _refuse_nested(directory.path, state)
    _refuse_shards(keeper, ranks)
    keeper.begin()


def _refuse_in_use(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(
            f"{str(path)!r} is not empty; give a new directory, or --resume to continue the run "
            "in it."
        )


def _refuse_nested(path: Path, state: Path | None) -> None:
    if state is None:
        return
    run, store = resolved_path(path), resolved_path(state)
    if run.is_relative_to(store) or store.is_relative_to(run):
        raise UsageError(
            f"The state store {str(state)!r} and the run's directory {str(path)!r} lie within each "
            "other; choose a place of its own for each."
        )


def _refuse_shards(keeper: KeepsCheckpoints, ranks: Ranks) -> None:
    if ranks.shards and isinstance(keeper, StateCheckpoints):
        raise UsageError(
            "A state store keeps each checkpoint as one file, and --parallel fsdp2 writes one a "
            "rank; leave --state out, or use --parallel ddp."
        )


def started_session(
    task: str,
    options: TrainOptions,
    source: Path | None,
    parts: Mapping[str, Any],
    sealer: Sealer | None,
) -> QATSession:
    """Returns a session of a new run, with the weights of `source` if it is given.

    Raises:
        CheckpointError: They cannot be read, or do not fit the model.
    """
    if source is None:
        return QATSession(task, options, **parts)
    start = parts["ranks"].everywhere(lambda: _start(source, sealer))
    if parts["load"] is None and parts["build_model"] is None and start.model is not None:
        require_fit(start.name, start.model)
    parts = {**parts, "build_model": parts["build_model"] or start.build_model}
    try:
        return QATSession(task, options, initial_weights=start.weights, **parts)
    except RuntimeError as error:
        reason = shorten(str(error), LONGEST_REASON, placeholder=" ...")
        raise CheckpointError(
            f"The weights in {start.name} do not fit the model of {task!r}: {reason}"
        ) from error


@dataclass(frozen=True, slots=True)
class _Start:
    """Weights to start from, the name of what they came from, and what builds their model."""

    name: str
    weights: dict[str, Tensor]
    model: ModelDescription | None
    build_model: BuildModel | None


def _start(source: Path, sealer: Sealer | None) -> _Start:
    if not _is_session(source):
        _refuse_unsaid(source)
        start = read_start(source)
        return _Start(source.name, start.weights, start.model, start.build_model)
    with _newest_of(source, sealer) as file:
        weights, record = saved_model(file)
    if record is None:
        return _Start(file.name, weights, None, None)
    model = ModelDescription(record["family"], record["config"])
    build_model = recorded_builder({**record, "compute": "exact"})
    return _Start(file.name, weights, model, build_model)


def _refuse_unsaid(source: Path) -> None:
    """Refuses files that do not say how they are read: they do not name a model of ours either.

    What opens them advises an option, which would only lead to that answer.

    Raises:
        CheckpointError: They leave a question open.
    """
    if detect(source).questions:
        raise CheckpointError(
            f"{str(source)!r} does not say that it holds a model of {' or '.join(TASK_OF)}, which "
            "training starts from; give a package, or a checkpoint with its configuration."
        )


@contextmanager
def _newest_of(path: Path, sealer: Sealer | None) -> Iterator[Path]:
    """Yields the checkpoint itself, or the newest one of a run, in whose directory nothing changes.

    It may be read-only, or another process may be training there.
    """
    if not path.is_dir() or has_session_header(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="forge-checkpoint-") as scratch:
        yield TrainingDirectory(path).keeper(scratch=Path(scratch), sealer=sealer).newest()


def _is_session(path: Path) -> bool:
    """Whether a path is a run's directory or one of its checkpoints, or is not there at all."""
    if path.is_dir():
        inside = (path / OPTIONS).exists() or (path / CHECKPOINTS).exists()
        return inside or has_session_header(path)
    return not path.exists() or has_session_header(path)


def newest_to_resume(
    directory: TrainingDirectory, keeper: KeepsCheckpoints, ranks: Ranks, on_note: OnNote
) -> Path:
    """Returns the checkpoint to go on from; before it, what killed writes have left is removed."""
    _refuse_shards(keeper, ranks)
    newest = keeper.resumable(on_note)
    remove_partials(directory.path)
    return newest


def resumed_session(
    directory: TrainingDirectory,
    newest: Path,
    task: str,
    options: TrainOptions,
    parts: Mapping[str, Any],
) -> QATSession:
    """Returns a session that continues from a checkpoint with the run's own model.

    Raises:
        CheckpointError: It belongs to another run.
    """
    build_model = parts["build_model"] or parts["ranks"].everywhere(directory.build_model)
    return resume_session(task, options, newest, **{**parts, "build_model": build_model})
