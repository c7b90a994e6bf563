"""Trains a run in its directory (`run_directory`): one line a step, checkpoints, the result."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from forge_harness.canonical import canonical_json
from forge_harness.durable import sync_directory, write_durably
from forge_harness.errors import ExitCode, ForgeError, NonFiniteError, UsageError
from forge_harness.formats.sizes import bytes_on_disk
from forge_harness.paths import resolved_path
from forge_harness.protocols import StepRecord, TrainOptions
from forge_harness.state import Sealer
from forge_harness.training.data import DataSource
from forge_harness.training.ingredients import BuildModel, Loss
from forge_harness.training.keeping import (
    KeepsCheckpoints,
    StateCheckpoints,
)
from forge_harness.training.package import export_package
from forge_harness.training.ranks import OneProcess, Ranks
from forge_harness.training.run_directory import (
    DATA,
    OPTIONS,
    PACKAGE,
    RESULT,
    STEPS,
    OnNote,
    TrainingDirectory,
    json_options,
)
from forge_harness.training.run_start import (
    begin_run,
    newest_to_resume,
    resumed_session,
    started_session,
)
from forge_harness.training.session import QATSession

OnStep = Callable[[StepRecord, int], None]
"""Called after each step with its record and the steps of the whole run."""


class TrainingInterrupted(ForgeError):
    """The run was stopped between two steps and can be resumed."""

    exit_code = ExitCode.INTERRUPTED


def train_to_directory(
    task: str,
    out: Path,
    options: TrainOptions,
    *,
    resume: bool = False,
    from_checkpoint: Path | None = None,
    checkpoint_every: int | None = None,
    state: Path | None = None,
    sealer: Sealer | None = None,
    on_step: OnStep | None = None,
    on_note: OnNote = warnings.warn,
    build_model: BuildModel | None = None,
    load: DataSource | None = None,
    loss: Loss | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Trains a task into a directory and returns what `metrics.json` holds.

    Of several ranks all call this together, and only rank 0 writes, but for the shards of a
    checkpoint.

    Args:
        task: `digits` or `bytes`, a variant allowed.
        out: Directory; must be empty or absent unless resuming.
        options: Of the session; when resuming, those the run was started with.
        resume: Continue from the newest checkpoint in `out`.
        from_checkpoint: Where the weights come from: a run's directory or checkpoint, of which a
            full-precision one makes this quantization-aware fine-tuning, or a checkpoint of a
            reference model in any readable format, which also says what model to build.
        checkpoint_every: Steps between checkpoints; 0 writes one at the end, or when interrupted.
            None: what a resumed run was last given, 0 for a new one.
        state: Root of a store that keeps the checkpoints, under the name of `out`; None: files in
            `out`. A resumed run remembers it.
        sealer: Encrypts what the store keeps; also opens what is gone on from. Never remembered.
        on_step: Told of every step.
        on_note: Told in a sentence what was lost and could be gone on without.
        build_model: As for `QATSession`; None: that of the run or checkpoint it goes on from, or
            the reference model.
        load: As for `QATSession`.
        loss: As for `QATSession`.
        ranks: As for `QATSession`; a run may be resumed with others than it was started with.

    Raises:
        RankError: One of these, where another rank raised it.
        DistributedError: The ranks hold different weights.
        UsageError: The directory is in use, there is nothing to resume, or the run was trained on
            other data.
        TrainingInterrupted: SIGINT, SIGTERM or SIGHUP arrived; a checkpoint was written after the
            step in progress. A second signal stops at once.
        NonFiniteError: A value was not finite; a checkpoint from before that step was written, or
            that of the last step where it is the held-out loss.
        UsageError: The file system refused a write.
    """
    ranks = ranks or OneProcess()
    directory = TrainingDirectory(Path(out))
    parts: dict[str, Any] = {"build_model": build_model, "load": load, "loss": loss, "ranks": ranks}
    keeper = directory.keeper(state, sealer=sealer)
    if resume:
        newest = ranks.first(lambda: newest_to_resume(directory, keeper, ranks, on_note))
        session = resumed_session(directory, newest, task, options, parts)
    else:
        ranks.first(lambda: begin_run(directory, keeper, state, ranks))
        session = started_session(task, options, from_checkpoint, parts, sealer)
    every = checkpoint_every
    if every is None:
        every = ranks.first(directory.checkpoint_every) if resume else 0
    try:
        ranks.first(lambda: _write_down(session, directory, keeper, resume, every, on_note))
        _train(session, directory, keeper, every, on_step)
        return _finish(session, directory, keeper)
    except OSError as error:
        raise UsageError(
            f"Cannot write to {str(directory.path)!r}: {error.strerror or error}; free space or "
            "choose another directory. --resume goes on from the last checkpoint, if there is one."
        ) from error


def _write_down(
    session: QATSession,
    directory: TrainingDirectory,
    keeper: KeepsCheckpoints,
    resume: bool,
    checkpoint_every: int,
    on_note: OnNote,
) -> None:
    """Writes what the run is; of a resumed one, what it goes on with."""
    content = _resumed(session, directory, on_note) if resume else _begun(session)
    content["checkpoint_every"] = checkpoint_every
    if isinstance(keeper, StateCheckpoints):
        root = str(resolved_path(keeper.root))
        content |= {"state": root, "kept_as": keeper.run, "run": keeper.owner}
    write_durably(directory.path / OPTIONS, canonical_json(content))


def _begun(session: QATSession) -> dict[str, Any]:
    content: dict[str, Any] = {
        "task": session.task,
        "options": json_options(session.options),
        DATA: session.data.data_digest(session.task),
    }
    if record := session.model_record():
        content["model"] = record
    # Of one process from its start to its end nothing is said.
    if session.ranks.record()["parallel"]:
        content["processes"] = [_processes(session)]
    return content


def _resumed(session: QATSession, directory: TrainingDirectory, on_note: OnNote) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory.path / OPTIONS).read_bytes())
    _refuse_other_data(session, content, directory.path)
    if lost := _keep_steps(directory.path / STEPS, session.step_index):
        on_note(lost)
    if "processes" in content or session.ranks.record()["parallel"]:
        earlier = content.get("processes") or [{"from_step": 0, **OneProcess().record()}]
        content["processes"] = [*earlier, _processes(session)]
    return content


def _processes(session: QATSession) -> dict[str, Any]:
    return {"from_step": session.step_index, **session.ranks.record()}


def _refuse_other_data(session: QATSession, content: Mapping[str, Any], path: Path) -> None:
    """The place in the data means nothing in others, as the corpus of another Python is."""
    digest = session.data.data_digest(session.task)
    # Runs of earlier builds do not say what they were trained on.
    if content.get(DATA, digest) != digest:
        raise UsageError(
            f"The run in {str(path)!r} was trained on data with the digest {content[DATA]!r}, and "
            f"here they have {digest!r}; resume it with the Python and the packages it was started "
            "with, or start a new run."
        )


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
    steps, ranks = session.options.steps, session.ranks
    with _step_lines(directory, ranks) as stream, _signals_noted() as noted:

        def sync() -> None:
            if stream is not None:
                os.fsync(stream.fileno())
                sync_directory(directory.path)

        def save() -> None:
            # First, so that no checkpoint has steps the file may yet lose.
            ranks.first(sync)
            session.refuse_divergence()
            keeper.save(session)

        def stop_if_noted(*, saved: bool = False) -> None:
            # All after one step: a signal may reach them in different ones.
            if any(ranks.gather(noted.is_set())):
                if not saved:
                    save()
                raise TrainingInterrupted(
                    f"Interrupted after {session.step_index} of {steps} steps; continue with "
                    "--resume."
                )

        while session.step_index < steps:
            try:
                record = session.step()
            except NonFiniteError:
                save()
                raise
            if stream is not None:
                stream.write(json.dumps(_line(record), allow_nan=False) + "\n")
            if on_step is not None:
                on_step(record, steps)
            stop_if_noted()
            if every and session.step_index % every == 0:
                save()
        save()
        stop_if_noted(saved=True)  # While it was.


@contextmanager
def _step_lines(directory: TrainingDirectory, ranks: Ranks) -> Iterator[TextIO | None]:
    """Yields where rank 0 writes a line a step; None on the others."""
    if ranks.rank:
        yield None
        return
    with (directory.path / STEPS).open("a", encoding="utf-8", buffering=1) as stream:
        yield stream


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


def _finish(
    session: QATSession, directory: TrainingDirectory, keeper: KeepsCheckpoints
) -> dict[str, Any]:
    quality = session.evaluate()
    if not all(map(math.isfinite, quality.values())):
        raise NonFiniteError(
            f"After {session.step_index} steps the held-out loss is {quality['loss']:g}; expected "
            "a finite number. The last checkpoint is kept: look at its weights, or lower the "
            "learning rate."
        )
    ternary = session.options.precision == "ternary"
    package = directory.path / PACKAGE if ternary else None
    model = session.whole_model() if ternary else None

    def write() -> dict[str, Any]:
        result = _result(session, directory) | quality
        if package is not None:
            export_package(session, package, model)
            result["package_bytes"] = bytes_on_disk(package)
        write_durably(directory.path / RESULT, canonical_json(result))
        keeper.finish(package, result)
        return result

    return session.ranks.first(write)


def _result(session: QATSession, directory: TrainingDirectory) -> dict[str, Any]:
    result = {
        "task": session.task,
        "precision": session.options.precision,
        "seed": session.options.seed,
        "steps": session.step_index,
        "parameters": sum(parameter.numel() for parameter in session.model.parameters()),
        DATA: session.data.data_digest(session.task),
    }
    with suppress(KeyError):
        result["processes"] = json.loads((directory.path / OPTIONS).read_bytes())["processes"]
    return result


def _line(record: StepRecord) -> dict[str, Any]:
    line = asdict(record)
    return line | {"sample_ids": list(record.sample_ids)}
