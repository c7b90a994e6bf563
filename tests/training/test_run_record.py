from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from forge_harness.errors import UsageError
from forge_harness.protocols import StepRecord
from forge_harness.training import TrainingInterrupted, train_to_directory
from forge_harness.training.data import ReferenceData
from forge_harness.training.keeping import DirectoryCheckpoints
from forge_harness.training.run_directory import TrainingDirectory

from .runs import OPTIONS, interrupt_at, lines


@pytest.mark.parametrize(
    ("cut", "missing", "first"),
    [
        (lambda text: text[:-20], 1, 3),
        (lambda text: "".join(text.splitlines(keepends=True)[:2]), 2, 2),
        (lambda text: "\0" * 30 + text[30:], 1, 0),
        (lambda text: None, 4, 0),
        (lambda text: text.replace('"step": 1,', '"step": 1e999,'), 1, 1),
        (lambda text: text.replace('"step": 2,', '"step": 2.5,'), 1, 2),
        (lambda text: "[" * 100_000 + text[text.index("\n") :], 1, 0),
    ],
)
def test_lost_steps_are_said_and_the_run_goes_on(
    tmp_path: Path, cut: Callable[[str], str | None], missing: int, first: int
) -> None:
    out, said = tmp_path / "run", []
    train_to_directory("digits", tmp_path / "through", OPTIONS)
    with pytest.raises(TrainingInterrupted):
        train_to_directory("digits", out, OPTIONS, on_step=interrupt_at(3, signal.SIGINT))
    left = cut((out / "metrics.jsonl").read_text())
    (out / "metrics.jsonl").unlink()
    if left is not None:
        (out / "metrics.jsonl").write_text(left)
    result = train_to_directory("digits", out, OPTIONS, resume=True, on_note=said.append)
    assert result == json.loads((tmp_path / "through/metrics.json").read_bytes())
    assert len(said) == 1
    assert f"lacks {missing} of the 4 steps made so far, the first of them step {first}" in said[0]
    kept = [row["step"] for row in lines(out)]
    assert len(kept) == 6 - missing
    assert kept == sorted(set(kept))
    assert kept[-2:] == [4, 5]


def test_a_pipe_in_place_of_the_steps_is_not_waited_for(tmp_path: Path) -> None:
    train_to_directory("digits", tmp_path / "run", OPTIONS)
    (tmp_path / "run/metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "run/metrics.jsonl")
    with pytest.raises(UsageError, match="it is not a plain file"):
        train_to_directory("digits", tmp_path / "run", OPTIONS, resume=True)


class OtherData(ReferenceData):
    """What another version of a package makes of the same task."""

    @staticmethod
    def data_digest(task: str) -> str:
        return "sha256:other"


def test_a_run_goes_on_with_the_data_it_began_with_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        train_to_directory(
            "digits", tmp_path / "run", OPTIONS, on_step=interrupt_at(1, signal.SIGINT)
        )
    before = sorted((tmp_path / "run").rglob("*")), lines(tmp_path / "run")
    with pytest.raises(UsageError, match="'sha256:other'; resume it with the Python and"):
        train_to_directory("digits", tmp_path / "run", OPTIONS, resume=True, load=OtherData())
    assert (sorted((tmp_path / "run").rglob("*")), lines(tmp_path / "run")) == before
    # A run of an earlier build does not say what it began with.
    file = tmp_path / "run/training.json"
    saved = json.loads(file.read_bytes())
    del saved["data_digest"]
    file.write_text(json.dumps(saved))
    train_to_directory("digits", tmp_path / "run", OPTIONS, resume=True, load=OtherData())


def test_a_resumed_run_keeps_its_steps_between_checkpoints(tmp_path: Path) -> None:
    """Or a run that is stopped twice loses what it made since the first time."""
    out = tmp_path / "run"
    with pytest.raises(TrainingInterrupted):
        train_to_directory(
            "digits", out, OPTIONS, checkpoint_every=2, on_step=interrupt_at(0, signal.SIGINT)
        )
    kept = DirectoryCheckpoints(out / "checkpoints")
    seen: list[list[str]] = []

    def look(record: StepRecord, _: int) -> None:
        seen.append([path.stem for path in kept.files()])

    train_to_directory("digits", out, OPTIONS, resume=True, on_step=look)
    assert seen[-1] == ["step-2", "step-4"]
    assert TrainingDirectory(out).checkpoint_every() == 2
