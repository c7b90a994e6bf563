"""Trains a run in its directory (`run_directory`): one line a step, checkpoints, the result."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from forge_harness.canonical import canonical_json
from forge_harness.durable import sync_directory, write_durably
from forge_harness.errors import NonFiniteError, UsageError
from forge_harness.formats.sizes import bytes_on_disk
from forge_harness.protocols import StepRecord, TrainOptions
from forge_harness.state import Sealer
from forge_harness.training.data import DataSource
from forge_harness.training.ingredients import BuildModel, Loss
from forge_harness.training.interruption import TrainingInterrupted, signals_noted
from forge_harness.training.keeping import KeepsCheckpoints
from forge_harness.training.package import export_package
from forge_harness.training.ranks import OneProcess, Ranks
from forge_harness.training.run_directory import (
    DATA,
    PACKAGE,
    RESULT,
    STEPS,
    OnNote,
    TrainingDirectory,
)
from forge_harness.training.run_record import write_down
from forge_harness.training.run_start import (
    begin_run,
    newest_to_resume,
    resumed_session,
    started_session,
)
from forge_harness.training.session import QATSession

OnStep = Callable[[StepRecord, int], None]
"""Called after each step with its record and the steps of the whole run."""


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
        ranks.first(lambda: write_down(session, directory, keeper, resume, every, on_note))
        _train(session, directory, keeper, every, on_step)
        return _finish(session, directory, keeper)
    except OSError as error:
        raise UsageError(
            f"Cannot write to {str(directory.path)!r}: {error.strerror or error}; free space or "
            "choose another directory. --resume goes on from the last checkpoint, if there is one."
        ) from error


def _train(
    session: QATSession,
    directory: TrainingDirectory,
    keeper: KeepsCheckpoints,
    every: int,
    on_step: OnStep | None,
) -> None:
    steps, ranks = session.options.steps, session.ranks
    with _step_lines(directory, ranks) as stream, signals_noted() as noted:

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
        result["processes"] = directory.saved()["processes"]
    return result


def _line(record: StepRecord) -> dict[str, Any]:
    line = asdict(record)
    return line | {"sample_ids": list(record.sample_ids)}
