"""What a run's directory says of the run: its options, its data, its processes, its steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from forge_harness.canonical import canonical_json
from forge_harness.durable import read_plain, write_durably
from forge_harness.errors import UsageError
from forge_harness.paths import resolved_path
from forge_harness.training.keeping import KeepsCheckpoints, StateCheckpoints
from forge_harness.training.ranks import OneProcess
from forge_harness.training.run_directory import (
    DATA,
    OPTIONS,
    STEPS,
    OnNote,
    TrainingDirectory,
    json_options,
)
from forge_harness.training.session import QATSession


def write_down(
    session: QATSession,
    directory: TrainingDirectory,
    keeper: KeepsCheckpoints,
    resume: bool,
    checkpoint_every: int,
    on_note: OnNote,
) -> None:
    """Writes what the run is; of a resumed one, what it goes on with.

    Args:
        session: About to take its first step here.
        directory: Of the run.
        keeper: Of its checkpoints; a store is remembered.
        resume: Whether it goes on from a checkpoint.
        checkpoint_every: Steps between checkpoints.
        on_note: Told which lines of earlier steps are lost.

    Raises:
        UsageError: The run was trained on other data.
    """
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
    content: dict[str, Any] = directory.saved()
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
        for line in read_plain(path).splitlines():
            if (step := _step_of(line)) is not None:
                lines.setdefault(step, line)
    kept = [lines[step] for step in range(made) if step in lines]
    write_durably(path, b"".join(line + b"\n" for line in kept))
    if len(kept) == made:
        return ""
    first = next(step for step in range(made) if step not in lines)
    return (
        f"{path.name} lacks {made - len(kept)} of the {made} steps made so far, the first of them "
        f"step {first}: the machine stopped before they were on disk. The training itself is whole."
    )


def _step_of(line: bytes) -> int | None:
    """The step a line is of; None of one that was cut off, or is something else."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int else None
