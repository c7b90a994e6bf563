"""A training run in a directory: step metrics, checkpoints, package, and how to continue.

DIR/training.json       task, options and model, written first
DIR/metrics.jsonl       one line a step
DIR/checkpoints/        the newest two, step-N.safetensors; with a store, they are states in it
DIR/package/            inference weights of a ternary model
DIR/metrics.json        held-out quality, written last: the run is complete
"""

from __future__ import annotations

import json
import operator
import os
import secrets
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from forge_harness.canonical import canonical_json
from forge_harness.durable import remove_partials, sync_directory, write_durably
from forge_harness.errors import ExitCode, ForgeError, NonFiniteError, UsageError
from forge_harness.formats.sizes import bytes_on_disk
from forge_harness.protocols import StepRecord, TrainOptions
from forge_harness.state import Sealer
from forge_harness.training.checkpoint import (
    CheckpointError,
    has_session_header,
    resume_session,
    saved_model,
)
from forge_harness.training.data import DataSource
from forge_harness.training.ingredients import BuildModel, Loss
from forge_harness.training.keeping import (
    DirectoryCheckpoints,
    KeepsCheckpoints,
    StateCheckpoints,
)
from forge_harness.training.model_record import checked_record, model_record, recorded_builder
from forge_harness.training.package import export_package
from forge_harness.training.session import QATSession
from forge_harness.training.start import read_start

OPTIONS = "training.json"
STEPS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
PACKAGE = "package"
RESULT = "metrics.json"
_SCRATCH = ".checkpoint"

_KINDS: dict[str, tuple[type, ...]] = {
    "seed": (int,),
    "steps": (int,),
    "precision": (str,),
    "batch_size": (int, NoneType),
    "accumulation": (int,),
    "learning_rate": (int, float, NoneType),
    "clip_norm": (int, float, NoneType),
    "fixed_batch": (list, NoneType),
    "extra": (dict,),
}
"""Option -> what JSON makes of it."""

OnNote = Callable[[str], object]
OnStep = Callable[[StepRecord, int], None]
"""Called after each step with its record and the steps of the whole run."""


class TrainingInterrupted(ForgeError):
    """The run was stopped between two steps and can be resumed."""

    exit_code = ExitCode.INTERRUPTED


@dataclass(frozen=True, slots=True)
class TrainingDirectory:
    """Names and checkpoints of a run's directory."""

    path: Path

    def keeper(
        self,
        state: Path | None = None,
        scratch: Path | None = None,
        sealer: Sealer | None = None,
    ) -> KeepsCheckpoints:
        """Returns where the run's checkpoints are kept.

        Args:
            state: Root of a store; None: the one the run was started with, if any.
            scratch: Directory for copies out of a store; None: one in the run's, for whoever
                trains there.
            sealer: Encrypts what a store keeps, and opens it.
        """
        saved: dict[str, Any] = {}
        with suppress(OSError, TypeError, ValueError):
            saved = dict(json.loads((self.path / OPTIONS).read_bytes()))
        if state is None:
            with suppress(KeyError, TypeError):
                state = Path(saved["state"])
        if state is None:
            return DirectoryCheckpoints(self.path / CHECKPOINTS)
        owner = str(saved.get("run", "")) if saved else secrets.token_hex(8)
        run = self.path.resolve().name
        return StateCheckpoints(state, run, scratch or self.path / _SCRATCH, owner, sealer)

    def options(self) -> tuple[str, TrainOptions]:
        """Returns task and options of the run.

        Raises:
            UsageError: The directory holds no run.
        """
        try:
            saved = json.loads((self.path / OPTIONS).read_bytes())
            return str(saved["task"]), _options_of(saved["options"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{str(self.path)!r} holds no training run to resume ({error}); start one without "
                "--resume."
            ) from error

    def model(self) -> dict[str, Any] | None:
        """Returns the run's `model_record`; None when there is none of its model.

        Raises:
            UsageError: What is there is no record.
        """
        try:
            saved = json.loads((self.path / OPTIONS).read_bytes()).get("model")
            return None if saved is None else checked_record(saved)
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{OPTIONS} in {str(self.path)!r} does not say what model the run trains "
                f"({error}); start a new run."
            ) from error

    def build_model(self) -> BuildModel | None:
        """Returns what builds the run's model; None when there is no record of it."""
        record = self.model()
        return None if record is None else recorded_builder(record)


def train_to_directory(
    task: str,
    out: Path,
    options: TrainOptions,
    *,
    resume: bool = False,
    from_checkpoint: Path | None = None,
    checkpoint_every: int = 0,
    state: Path | None = None,
    sealer: Sealer | None = None,
    on_step: OnStep | None = None,
    on_note: OnNote = warnings.warn,
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
        sealer: Encrypts what the store keeps; also opens what is gone on from. Never remembered.
        on_step: Told of every step.
        on_note: Told in a sentence what was lost and could be gone on without.
        build_model: As for `QATSession`; None: that of the run or checkpoint it goes on from, or
            the reference model.
        load: As for `QATSession`.
        loss: As for `QATSession`.

    Raises:
        UsageError: The directory is in use, or there is nothing to resume.
        TrainingInterrupted: SIGINT, SIGTERM or SIGHUP arrived; a checkpoint was written after the
            step in progress. A second signal stops at once.
        NonFiniteError: A value was not finite; a checkpoint from before that step was written.
        UsageError: The file system refused a write.
    """
    directory = TrainingDirectory(Path(out))
    parts: dict[str, Any] = {"build_model": build_model, "load": load, "loss": loss}
    keeper = directory.keeper(state, sealer=sealer)
    if resume:
        session = _resumed(directory, keeper, task, options, parts, on_note)
        if lost := _keep_steps(directory.path / STEPS, session.step_index):
            on_note(lost)
    else:
        _refuse_in_use(directory.path)
        _refuse_nested(directory.path, state)
        keeper.begin()
        session = _started(task, options, from_checkpoint, parts, sealer)
    try:
        if not resume:
            content: dict[str, Any] = {"task": task, "options": _json_options(options)}
            if record := model_record(session.model):
                content["model"] = record
            if isinstance(keeper, StateCheckpoints):
                content |= {"state": str(keeper.root.resolve()), "run": keeper.owner}
            write_durably(directory.path / OPTIONS, canonical_json(content))
        _train(session, directory, keeper, checkpoint_every, on_step)
        result = _finish(session, directory)
        ternary = session.options.precision == "ternary"
        keeper.finish(directory.path / PACKAGE if ternary else None, result)
        return result
    except OSError as error:
        raise UsageError(
            f"Cannot write to {str(directory.path)!r}: {error.strerror or error}; free space or "
            "choose another directory. --resume goes on from the last checkpoint, if there is one."
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


def _refuse_nested(path: Path, state: Path | None) -> None:
    if state is None:
        return
    run, store = path.resolve(), state.resolve()
    if run.is_relative_to(store) or store.is_relative_to(run):
        raise UsageError(
            f"The state store {str(state)!r} and the run's directory {str(path)!r} lie within each "
            "other; choose a place of its own for each."
        )


def _started(
    task: str,
    options: TrainOptions,
    source: Path | None,
    parts: Mapping[str, Any],
    sealer: Sealer | None,
) -> QATSession:
    if source is None:
        return QATSession(task, options, **parts)
    if _is_session(source):
        with _newest_of(source, sealer) as file:
            weights, record = saved_model(file)
        build_model = None if record is None else recorded_builder({**record, "compute": "exact"})
    else:
        file, start = source, read_start(source)
        weights, build_model = start.weights, start.build_model
    parts = {**parts, "build_model": parts["build_model"] or build_model}
    try:
        return QATSession(task, options, initial_weights=weights, **parts)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"The weights in {file.name} do not fit the model of {task!r}: {reason}"
        ) from error


@contextmanager
def _newest_of(path: Path, sealer: Sealer | None) -> Iterator[Path]:
    """Yields the checkpoint itself, or the newest one of a run, in whose directory nothing changes.

    It may be read-only, or another process may be training there.
    """
    if not path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="forge-checkpoint-") as scratch:
        yield TrainingDirectory(path).keeper(scratch=Path(scratch), sealer=sealer).newest()


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
    on_note: OnNote,
) -> QATSession:
    newest = keeper.resumable(on_note)
    remove_partials(directory.path)
    parts = {**parts, "build_model": parts["build_model"] or directory.build_model()}
    return resume_session(task, options, newest, **parts)


def _keep_steps(path: Path, made: int) -> str:
    """Leaves the lines of the steps a checkpoint has; says which of them are missing, or "".

    Steps after the checkpoint are made again; their lines would be there twice.
    """
    lines: dict[int, bytes] = {}
    with suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, TypeError, KeyError):
                lines.setdefault(int(json.loads(line)["step"]), line)
    kept = [lines[step] for step in range(made) if step in lines]
    write_durably(path, b"".join(line + b"\n" for line in kept))
    if len(kept) == made:
        return ""
    first = next(step for step in range(made) if step not in lines)
    return (
        f"{path.name} lacks {made - len(kept)} of the {made} steps made so far, the first of them "
        f"step {first}: the machine stopped before they were on disk. The training itself is whole."
    )


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

        def save() -> None:
            # First, so that no checkpoint has steps the file may yet lose.
            os.fsync(stream.fileno())
            sync_directory(directory.path)
            keeper.save(session)

        while session.step_index < steps:
            try:
                record = session.step()
            except NonFiniteError:
                save()
                raise
            stream.write(json.dumps(_line(record), allow_nan=False) + "\n")
            if on_step is not None:
                on_step(record, steps)
            if noted.is_set():
                save()
                raise TrainingInterrupted(
                    f"Interrupted after {session.step_index} of {steps} steps; continue with "
                    "--resume."
                )
            if every and session.step_index % every == 0:
                save()
        save()
        if noted.is_set():  # While it was saved.
            raise TrainingInterrupted(
                f"Interrupted after {steps} of {steps} steps; continue with --resume."
            )


@contextmanager
def _signals_noted() -> Iterator[threading.Event]:
    """Turns the first SIGINT, SIGTERM or SIGHUP into an event, so that no step is cut in half."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    numbers = [signal.Signals[n] for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    # None: a handler that was not set by Python, and cannot be set again from here. One that is
    # ignored stays so: nohup, and a shell's background jobs, mean it.
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
    before = {n: handler for n, handler in before.items() if handler is not signal.SIG_IGN}

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


def _options_of(saved: Any) -> TrainOptions:  # noqa: ANN401 - any JSON value
    """Returns the options in a file; raises KeyError, TypeError or ValueError."""
    options = {**saved, "validation_canaries": ()}
    for key, kinds in _KINDS.items():
        if type(options[key]) not in kinds:
            raise ValueError(f"option {key} is {options[key]!r:.80}")
    if options["fixed_batch"] is not None:
        options["fixed_batch"] = tuple(operator.index(index) for index in options["fixed_batch"])
    return TrainOptions(**options)


def _line(record: StepRecord) -> dict[str, Any]:
    line = asdict(record)
    return line | {"sample_ids": list(record.sample_ids)}


def _json_options(options: TrainOptions) -> dict[str, Any]:
    if options.validation_canaries:
        raise UsageError("validation_canaries belong to checks, not to a run in a directory.")
    return asdict(options)
