from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
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


def test_a_run_is_resumed_whatever_kind_of_number_it_was_started_with(tmp_path: Path) -> None:
    """Numbers of NumPy and no clipping are taken as options, so a run must be able to say them."""
    options = TrainOptions(
        seed=np.int32(3),
        steps=np.int64(2),
        batch_size=np.int16(4),
        learning_rate=np.float32(0.5),
        clip_norm=math.inf,
        fixed_batch=[np.int64(1), 2],  # type: ignore[arg-type]
        extra={"weight_decay": np.float64(0.5), "betas": [0, np.float32(0.5)]},
    )
    train_to_directory("digits", tmp_path, options)
    task, saved = TrainingDirectory(tmp_path).options()
    assert (saved.seed, saved.clip_norm, saved.fixed_batch) == (3, math.inf, (1, 2))
    before = (tmp_path / "package" / "model.safetensors").read_bytes()
    for again in (saved, options):
        train_to_directory(task, tmp_path, again, resume=True)
    assert (tmp_path / "package" / "model.safetensors").read_bytes() == before


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
