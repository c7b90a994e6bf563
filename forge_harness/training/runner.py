"""A training run in a directory: step metrics, checkpoints, package, and how to continue.

DIR/training.json       task and options, written first
DIR/metrics.jsonl       one line a step
DIR/checkpoints/        the newest two, step-N.safetensors; with a store, they are states in it
DIR/package/            inference weights of a ternary model
DIR/metrics.json        held-out quality, written last: the run is complete
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forge_harness.canonical import canonical_json
from forge_harness.durable import write_durably
from forge_harness.errors import ExitCode, ForgeError, NonFiniteError, UsageError
from forge_harness.formats import ModelDescription
from forge_harness.formats.sizes import bytes_on_disk
from forge_harness.protocols import StepRecord, TrainOptions
from forge_harness.training.checkpoint import (
    CheckpointError,
    has_session_header,
    model_weights,
    resume_session,
)
from forge_harness.training.data import DataSource
from forge_harness.training.ingredients import BuildModel, Loss
from forge_harness.training.keeping import (
    DirectoryCheckpoints,
    KeepsCheckpoints,
    StateCheckpoints,
)
from forge_harness.training.package import export_package
from forge_harness.training.session import QATSession
from forge_harness.training.start import Start, builder_of, read_start

OPTIONS = "training.json"
STEPS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
PACKAGE = "package"
RESULT = "metrics.json"
_SCRATCH = ".checkpoint"

OnStep = Callable[[StepRecord, int], None]
"""Called after each step with its record and the steps of the whole run."""


class TrainingInterrupted(ForgeError):
    """The run was stopped between two steps and can be resumed."""

    exit_code = ExitCode.INTERRUPTED


@dataclass(frozen=True, slots=True)
class TrainingDirectory:
    """Names and checkpoints of a run's directory."""

    path: Path

    def keeper(self, state: Path | None = None) -> KeepsCheckpoints:
        """Returns where the run's checkpoints are kept.

        Args:
            state: Root of a store; None: the one the run was started with, if any.
        """
        if state is None:
            with suppress(OSError, KeyError, TypeError, ValueError):
                state = Path(json.loads((self.path / OPTIONS).read_bytes())["state"])
        if state is None:
            return DirectoryCheckpoints(self.path / CHECKPOINTS)
        return StateCheckpoints(state, self.path.resolve().name, self.path / _SCRATCH)

    def options(self) -> tuple[str, TrainOptions]:
        """Returns task and options of the run.

        Raises:
            UsageError: The directory holds no run.
        """
        try:
            saved = json.loads((self.path / OPTIONS).read_bytes())
            options = dict(saved["options"])
            if options["fixed_batch"] is not None:
                options["fixed_batch"] = tuple(options["fixed_batch"])
            options["validation_canaries"] = ()
            return str(saved["task"]), TrainOptions(**options)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{str(self.path)!r} holds no training run to resume ({error}); start one without "
                "--resume."
            ) from error

    def build_model(self) -> BuildModel | None:
        """Returns what builds the run's model, where a checkpoint it started from said so."""
        try:
            saved = json.loads((self.path / OPTIONS).read_bytes()).get("model")
            if saved is None:
                return None
            return builder_of(ModelDescription(saved["family"], saved["config"]), saved["compute"])
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{OPTIONS} in {str(self.path)!r} does not say what model the run trains "
                f"({error}); start a new run."
            ) from error


def train_to_directory(
    task: str,
    out: Path,
    options: TrainOptions,
    *,
    resume: bool = False,
    from_checkpoint: Path | None = None,
    checkpoint_every: int = 0,
    state: Path | None = None,
    on_step: OnStep | None = None,
    build_model: BuildModel | None = None,
    load: DataSource | None = None,
    loss: Loss | None = None,
) -> dict[str, Any]:
    """Trains a task into a directory and returns what `metrics.json` holds.

    Args:
        task: `digits` or `bytes`, a variant allowed.
        out: Directory; must be empty or absent unless resuming.
        options: Of the session; when resuming, those the run was started with.
        resume: Continue from the newest checkpoint in `out`.
        from_checkpoint: Where the weights come from: a run's directory or checkpoint, of which a
            full-precision one makes this quantization-aware fine-tuning, or a checkpoint of a
            reference model in any readable format, which also says what model to build.
        checkpoint_every: Steps between checkpoints; 0 writes one at the end, or when interrupted.
        state: Root of a store that keeps the checkpoints, under the name of `out`; None: files in
            `out`. A resumed run remembers it.
        on_step: Told of every step.
        build_model: As for `QATSession`.
        load: As for `QATSession`.
        loss: As for `QATSession`.

    Raises:
        UsageError: The directory is in use, or there is nothing to resume.
        TrainingInterrupted: SIGINT or SIGTERM arrived; a checkpoint was written after the step
            in progress. A second signal stops at once.
        NonFiniteError: A value was not finite; a checkpoint from before that step was written.
        ForgeError: The file system refused a write.
    """
    directory = TrainingDirectory(Path(out))
    parts: dict[str, Any] = {"build_model": build_model, "load": load, "loss": loss}
    keeper = directory.keeper(state)
    if resume:
        session = _resumed(directory, keeper, task, options, parts)
    else:
        _refuse_in_use(directory.path)
        keeper.begin()
        session, start = _started(task, options, from_checkpoint, parts)
    try:
        if not resume:
            content = {"task": task, "options": _json_options(options)}
            if start is not None and build_model is None:
                content["model"] = {**asdict(start.model), "compute": start.compute}
            if state is not None:
                content["state"] = str(state.resolve())
            write_durably(directory.path / OPTIONS, canonical_json(content))
        _train(session, directory, keeper, checkpoint_every, on_step)
        result = _finish(session, directory)
        ternary = session.options.precision == "ternary"
        keeper.finish(directory.path / PACKAGE if ternary else None, result)
        return result
    except OSError as error:
        raise ForgeError(
            f"Cannot write to {str(directory.path)!r}: {error.strerror or error}; free space or "
            "choose another directory, then resume."
        ) from error


def newest_checkpoint(path: Path) -> Path:
    """Returns the checkpoint itself, or the newest one of a run's directory.

    Raises:
        CheckpointError: The directory has none.
    """
    return TrainingDirectory(path).keeper().newest() if path.is_dir() else path


def _refuse_in_use(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(
            f"{str(path)!r} is not empty; give a new directory, or --resume to continue the run "
            "in it."
        )


def _started(
    task: str, options: TrainOptions, source: Path | None, parts: Mapping[str, Any]
) -> tuple[QATSession, Start | None]:
    if source is None:
        return QATSession(task, options, **parts), None
    if _is_session(source):
        file, start = newest_checkpoint(source), None
        weights = model_weights(file)
    else:
        file, start = source, read_start(source)
        weights = start.weights
        parts = {**parts, "build_model": parts["build_model"] or start.build_model}
    try:
        return QATSession(task, options, initial_weights=weights, **parts), start
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"The weights in {file.name} do not fit the model of {task!r}: {reason}"
        ) from error


def _is_session(path: Path) -> bool:
    """Whether a path is a run's directory or one of its checkpoints, or is not there at all."""
    if path.is_dir():
        return (path / OPTIONS).exists() or (path / CHECKPOINTS).exists()
    return not path.exists() or has_session_header(path)


def _resumed(
    directory: TrainingDirectory,
    keeper: KeepsCheckpoints,
    task: str,
    options: TrainOptions,
    parts: Mapping[str, Any],
) -> QATSession:
    newest = keeper.newest()
    parts = {**parts, "build_model": parts["build_model"] or directory.build_model()}
    session = resume_session(task, options, newest, **parts)
    # Steps after the checkpoint are made again; their lines would be there twice.
    lines = (directory.path / STEPS).read_bytes().splitlines(keepends=True)
    write_durably(directory.path / STEPS, b"".join(lines[: session.step_index]))
    return session


def _train(
    session: QATSession,
    directory: TrainingDirectory,
    keeper: KeepsCheckpoints,
    every: int,
    on_step: OnStep | None,
) -> None:
    steps = session.options.steps
    with (
        (directory.path / STEPS).open("a", encoding="utf-8", buffering=1) as stream,
        _signals_noted() as noted,
    ):
        while session.step_index < steps:
            try:
                record = session.step()
            except NonFiniteError:
                keeper.save(session)
                raise
            stream.write(json.dumps(_line(record), allow_nan=False) + "\n")
            if on_step is not None:
                on_step(record, steps)
            if noted.is_set():
                keeper.save(session)
                raise TrainingInterrupted(
                    f"Interrupted after {session.step_index} of {steps} steps; continue with "
                    "--resume."
                )
            if every and session.step_index % every == 0:
                keeper.save(session)
    keeper.save(session)


@contextmanager
def _signals_noted() -> Iterator[threading.Event]:
    """Turns the first SIGINT or SIGTERM into an event, so that no step is cut in half."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: object) -> None:
        noted.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(session: QATSession, directory: TrainingDirectory) -> dict[str, Any]:
    result: dict[str, Any] = {
        "task": session.task,
        "precision": session.options.precision,
        "seed": session.options.seed,
        "steps": session.step_index,
        "parameters": sum(parameter.numel() for parameter in session.model.parameters()),
        "data_digest": session.data.data_digest(session.task),
        **session.evaluate(),
    }
    if session.options.precision == "ternary":
        package = directory.path / PACKAGE
        export_package(session, package)
        result["package_bytes"] = bytes_on_disk(package)
    write_durably(directory.path / RESULT, canonical_json(result))
    return result


def _line(record: StepRecord) -> dict[str, Any]:
    line = asdict(record)
    return line | {"sample_ids": list(record.sample_ids)}


def _json_options(options: TrainOptions) -> dict[str, Any]:
    if options.validation_canaries:
        raise UsageError("validation_canaries belong to checks, not to a run in a directory.")
    return asdict(options)
