from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from forge_harness.errors import UsageError
from forge_harness.protocols import TrainOptions
from forge_harness.training import train_to_directory
from forge_harness.training.run_directory import TrainingDirectory


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "8"), ("steps", True), ("extra", None), ("extra", [1]), ("seed", 1.5),
        ("fixed_batch", ["x"]), ("fixed_batch", "x"), ("learning_rate", "1"), ("precision", 3),
    ],
)  # fmt: skip
def test_options_that_are_none_are_refused(tmp_path: Path, key: str, value: object) -> None:
    train_to_directory("digits", tmp_path, TrainOptions(steps=1, batch_size=2))
    saved = json.loads((tmp_path / "training.json").read_bytes())
    saved["options"][key] = value
    (tmp_path / "training.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match="holds no training run to resume"):
        TrainingDirectory(tmp_path).options()


def test_a_file_that_is_nested_too_deep_holds_no_run(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"to resume \(its values are nested too deep\)"):
        TrainingDirectory(tmp_path).options()
    assert TrainingDirectory(tmp_path).keeper()


def test_a_pipe_in_place_of_the_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "training.json")
    with pytest.raises(UsageError, match="it is not a plain file"):
        TrainingDirectory(tmp_path).options()


def test_steps_between_checkpoints_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text('{"checkpoint_every": true}')
    with pytest.raises(UsageError, match=r"it is True.*give --checkpoint-every"):
        TrainingDirectory(tmp_path).checkpoint_every()
