"""Makes the steps of a run and says what came of it; run as a script, in another process.

`python -P rerun.py DIRECTORY` reads the job that `elsewhere` left in the directory. It imports
nothing of the suite: a script knows no package, and names like `support` belong to the subject.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forge_harness import oracles

JOB = "job.pickle"
RESULT = "result.json"
PACKAGE = "package"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What two runs must share, bit for bit. JSON keeps every float as it is."""

    facts: list[Any]
    """Everything each step reports, but its duration."""
    state: dict[str, str]
    """Digest of each tensor of the state."""
    metrics: dict[str, float]
    """What `evaluate` says at the end."""


def outcome(session: Any, records: Sequence[Any]) -> Outcome:
    """Returns what came of a run so far."""
    return Outcome(facts(records), digests(session.state_tensors()), metrics(session))


def facts(records: Sequence[Any]) -> list[Any]:
    """Returns all that steps report, but their durations, as plain numbers."""
    return [
        [
            *(int(r.step), float(r.loss), float(r.learning_rate), float(r.weight_decay)),
            *(float(r.grad_norm), [int(index) for index in r.sample_ids]),
        ]
        for r in records
    ]


def metrics(session: Any) -> dict[str, float]:
    """Returns what `evaluate` says, as plain numbers."""
    return {name: float(value) for name, value in session.evaluate().items()}


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns a sha256 of dtype, shape and bytes of each tensor."""
    return {name: digest(tensor) for name, tensor in tensors.items()}


def digest(tensor: Tensor) -> str:
    """Returns a sha256 of dtype, shape and bytes."""
    values = oracles.whole(tensor.detach()).cpu().contiguous()
    hasher = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
    hasher.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class Job:
    """What the other process is told."""

    spec: str | None
    """How the subject is loaded; None: it is in `pickled`."""
    pickled: bytes
    modules: list[tuple[str, str]]
    """Name and file of the modules the pickle refers to."""
    task: str
    options: Any
    steps: int
    checkpoint: str | None
    """What to resume from; None: a new session."""
    threads: int


def main(directory: Path) -> None:
    """Does the job of a directory and writes its result, or why it could not."""
    stage, result = "loading", {}
    try:
        job = Job(**pickle.loads((directory / JOB).read_bytes()))
        torch.set_num_threads(job.threads)
        subject = _subject(job)
        stage = "running"
        result = _run(subject, job, directory)
    except Exception as error:
        # A subject may raise anything; the check that waits for this file is to say what.
        result = {"failed": stage, "error": f"{type(error).__name__}: {error}"}
    (directory / RESULT).write_text(json.dumps(result), encoding="utf-8")


def _subject(job: Job) -> Any:
    if job.spec is not None:
        from forge_harness.subject.loader import load_subject

        return load_subject(job.spec).subject
    for name, file in job.modules:
        with suppress(ImportError):
            importlib.import_module(name)
        if name not in sys.modules:
            # A module that has a name of its own, which only its file knows.
            spec = importlib.util.spec_from_file_location(name, file)
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
    return pickle.loads(job.pickled)


def _run(subject: Any, job: Job, directory: Path) -> dict[str, Any]:
    def begin() -> Any:
        if job.checkpoint is None:
            return subject.session(job.task, job.options)
        return subject.resume_session(job.task, job.options, Path(job.checkpoint))

    session = begin()
    result = {"begun_at": int(session.step_index)} if job.checkpoint is not None else {}
    records = [session.step() for _ in range(job.steps)]
    end = outcome(session, records)
    result |= {"facts": end.facts, "state": end.state, "metrics": end.metrics}
    if job.checkpoint is not None:
        # Of a session of its own: evaluating and exporting must not be what makes it right.
        first = begin()
        result["metrics_at_once"] = metrics(first)
        if callable(getattr(subject, "export_package", None)):
            subject.export_package(first, directory / PACKAGE)
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]))
