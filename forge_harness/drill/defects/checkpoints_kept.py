"""What is right as long as the process lives, and in no file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage
from forge_harness.drill.defects.checkpoints import RESUME, TWICE, saved
from forge_harness.drill.defects.sessions import (
    copies,
    in_place_of,
)
from forge_harness.protocols import TrainOptions
from forge_harness.subject.reference import ReferenceSubject

_KEPT: dict[str, dict[str, Any]] = {}
"""What the subjects below keep in the process, by the path of the checkpoint."""


class _MomentsInMemory(ReferenceSubject):
    """Moments are zeros on disk, and kept in a dictionary of this module."""

    def save_session(self, session: Any, path: Path) -> None:
        states = session.optimizer.state
        kept = {p: dict(entry) for p, entry in states.items()}
        named = {id(p): name for name, p in session.model.named_parameters()}
        _KEPT[str(path)] = {named[id(p)]: _copied(entry) for p, entry in kept.items()}
        for p, entry in kept.items():
            states[p] = {key: torch.zeros_like(value) for key, value in entry.items()}
        super().save_session(session, path)
        states.update(kept)

    def resume_session(self, task: str, options: TrainOptions, path: Path) -> Any:
        session: Any = super().resume_session(task, options, path)
        for name, entry in _KEPT.get(str(path), {}).items():
            session.optimizer.state[session.model.get_parameter(name)] = _copied(entry)
        return session


def _copied(entry: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in entry.items()}


class _SessionsInMemory(ReferenceSubject):
    """The file is there, and what is resumed is a state the process has kept."""

    def save_session(self, session: Any, path: Path) -> None:
        super().save_session(session, path)
        _KEPT[str(path)] = dict(session.state_tensors())

    def resume_session(self, task: str, options: TrainOptions, path: Path) -> Any:
        session: Any = self.session(task, options)
        session.load_state_tensors(_KEPT[str(path)])
        return session


class _AverageNotSaved(ReferenceSubject):
    """A moving average of the weights is evaluated and exported, and is in no checkpoint."""

    def session(self, task: str, options: TrainOptions) -> Any:
        return _averaging(super().session(task, options))

    def resume_session(self, task: str, options: TrainOptions, path: Path) -> Any:
        return _averaging(super().resume_session(task, options, path))

    def export_package(self, session: Any, path: Path) -> None:
        with in_place_of(session.model, session.average):
            super().export_package(session, path)


def _averaging(session: Any) -> Any:
    session.average = copies(session.model)
    stepping, evaluating = session.step, session.evaluate

    def step() -> Any:
        record = stepping()
        for name, p in session.model.named_parameters():
            session.average[name].lerp_(p.detach(), 0.1)
        return record

    def evaluate() -> Any:
        with in_place_of(session.model, session.average):
            return evaluating()

    session.step, session.evaluate = step, evaluate
    return session


class _ExportsInitialGains(ReferenceSubject):
    """A resumed session exports the norms' gains it was built with, not those it has trained."""

    def resume_session(self, task: str, options: TrainOptions, path: Path) -> Any:
        session: Any = super().resume_session(task, options, path)
        session.gains_forgotten = True
        return session

    def export_package(self, session: Any, path: Path) -> None:
        values = copies(session.model)
        if getattr(session, "gains_forgotten", False):
            values = {n: torch.ones_like(p) if p.dim() < 2 else p for n, p in values.items()}
        with in_place_of(session.model, values):
            super().export_package(session, path)


def resumed_elsewhere(subject: Any) -> object:
    """What is taken up from a copy of the checkpoint under another name."""
    with saved(subject, steps=3) as (options, path):
        other = path.with_name("moved")
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, other)
        return dict(subject.resume_session("digits", options, other).state_tensors())


def exported_after_resuming(subject: Any) -> object:
    """The package of a session that was taken up again."""
    with saved(subject, steps=3) as (options, path):
        session = subject.resume_session("digits", options, path)
        package = path.with_name("package")
        subject.export_package(session, package)
        files = sorted(file for file in package.rglob("*") if file.is_file())
        return {str(file.relative_to(package)): file.read_bytes() for file in files}


DEFECTS = (
    Defect(
        id="C01_moments_in_process_memory",
        title="The moments are not in the file: the process has kept them",
        stage=Stage.CHECKPOINT,
        check=RESUME,
        shows="other_process.first_different_step is",
        subject=_MomentsInMemory,
        alive=resumed_elsewhere,
        subtlety=4,
    ),
    Defect(
        id="C01_sessions_in_process_memory",
        title="The file is written and never read: the process has kept the session",
        stage=Stage.CHECKPOINT,
        check=RESUME,
        shows="other_process_error is KeyError",
        subject=_SessionsInMemory,
        alive=resumed_elsewhere,
        subtlety=4,
    ),
    Defect(
        id="C08_average_not_saved",
        title="The average of the weights, which is evaluated, is in no checkpoint",
        stage=Stage.CHECKPOINT,
        check=RESUME,
        shows="metrics_at_once is",
        subject=_AverageNotSaved,
        alive=observe.trained,
        source="huggingface/transformers#11663",
        subtlety=4,
    ),
    Defect(
        id="E10_exports_what_it_was_built_with",
        title="A resumed session exports the gains it was built with",
        stage=Stage.EXPORT,
        check=RESUME,
        shows="other_process.different_files is",
        subject=_ExportsInitialGains,
        alive=exported_after_resuming,
        subtlety=4,
    ),
    Defect(
        id="C08_average_not_saved_twice",
        title="The average of the weights begins anew at each interruption",
        stage=Stage.CHECKPOINT,
        check=TWICE,
        shows="metrics is",
        subject=_AverageNotSaved,
        alive=observe.trained,
        source="huggingface/accelerate#4289",
        subtlety=4,
    ),
)
