from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from forge_harness.errors import ForgeError
from forge_harness.protocols import StepRecord, TrainOptions
from forge_harness.state import Store
from forge_harness.training import CheckpointError, train_to_directory
from forge_harness.training.checkpoint import read_checkpoint
from forge_harness.training.keeping import StateCheckpoints
from forge_harness.training.runner import TrainingDirectory

OPTIONS = TrainOptions(steps=6, batch_size=16)


class Stop(Exception):
    """The process dies here, without a last checkpoint."""


def stop_at(step: int):
    def on_step(record: StepRecord, _: int) -> None:
        if record.step == step:
            raise Stop

    return on_step


def names(root: Path) -> list[str]:
    with Store.open(root) as store:
        return sorted(state.name for state in store.list())


def damage(root: Path, name: str) -> None:
    with Store.open(root) as store:
        (blob,) = store.get("phase5", name).files.values()
    (file,) = root.rglob(f"{blob.digest}*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.chmod(0o600)
    file.write_bytes(content)


def test_checkpoints_and_result_are_states_and_nothing_else_is_left(tmp_path: Path) -> None:
    result = train_to_directory(
        "digits", tmp_path / "run", OPTIONS, checkpoint_every=2, state=tmp_path / "states"
    )
    assert names(tmp_path / "states") == ["run/metrics", "run/package", "run/step-4", "run/step-6"]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"training.json", "metrics.jsonl", "metrics.json", "package"}
    with Store.open(tmp_path / "states") as store:
        metrics = store.get("phase5", "run/metrics")
        assert json.loads(store.read(metrics))["accuracy"] == result["accuracy"]
        assert metrics.metadata["task"] == "digits"
        assert metrics.parents == (store.get("phase5", "run/step-6").id,)
        package = store.get("phase5", "run/package")
        for file in package.files:
            assert store.read(package, file) == (tmp_path / "run/package" / file).read_bytes()


def test_a_run_that_died_goes_on_from_the_store_bit_for_bit(tmp_path: Path) -> None:
    train_to_directory("digits", tmp_path / "through", OPTIONS)
    out, states = tmp_path / "out", tmp_path / "states"
    with pytest.raises(Stop):
        train_to_directory(
            "digits", out, OPTIONS, checkpoint_every=2, state=states, on_step=stop_at(4)
        )
    assert names(states) == ["out/step-2", "out/step-4"]
    task, options = TrainingDirectory(out).options()
    train_to_directory(task, out, options, resume=True)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(6))
    _, ours = read_checkpoint(TrainingDirectory(out).keeper().newest())
    _, theirs = read_checkpoint(TrainingDirectory(tmp_path / "through").keeper().newest())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num()) for name in ours)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    states = tmp_path / "states"
    train_to_directory("digits", tmp_path / "run", OPTIONS, checkpoint_every=3, state=states)
    damage(states, "run/step-6")
    keeper = StateCheckpoints(states, "run", tmp_path / "scratch")
    assert keeper.newest().name == "step-3.safetensors"
    damage(states, "run/step-3")
    with pytest.raises(CheckpointError, match="no sound checkpoint of run 'run'"):
        keeper.newest()


def test_another_run_of_the_same_name_is_refused_before_it_trains(tmp_path: Path) -> None:
    states = tmp_path / "states"
    train_to_directory("digits", tmp_path / "a/run", OPTIONS, state=states)
    with pytest.raises(CheckpointError, match=r"a run 'run' \(run/step-6\); give --out another"):
        train_to_directory("digits", tmp_path / "b/run", OPTIONS, state=states)
    assert not (tmp_path / "b").exists()


def test_a_store_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    states = tmp_path / "states"
    train_to_directory("digits", tmp_path / "run", OPTIONS, state=states)
    shutil.rmtree(states)
    with pytest.raises(ForgeError, match="There is no state store"):
        train_to_directory("digits", tmp_path / "run", OPTIONS, resume=True)
