from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from forge_harness.errors import ForgeError
from forge_harness.protocols import StepRecord, TrainOptions
from forge_harness.security.keys import Keyring
from forge_harness.security.sealing import KeyringSealer
from forge_harness.state import NewState, Store
from forge_harness.training import CheckpointError, train_to_directory
from forge_harness.training.checkpoint import read_checkpoint
from forge_harness.training.keeping import StateCheckpoints
from forge_harness.training.run_directory import TrainingDirectory

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


def test_a_run_whose_directory_was_renamed_goes_on_under_the_name_it_is_kept_as(
    tmp_path: Path,
) -> None:
    out, states = tmp_path / "out", tmp_path / "states"
    with pytest.raises(Stop):
        train_to_directory(
            "digits", out, OPTIONS, checkpoint_every=2, state=states, on_step=stop_at(4)
        )
    renamed = out.rename(tmp_path / "renamed")
    assert train_to_directory("digits", renamed, OPTIONS, resume=True)["steps"] == 6
    assert names(states) == ["out/metrics", "out/package", "out/step-4", "out/step-6"]


def test_a_run_remembers_the_store_it_was_last_kept_in(tmp_path: Path) -> None:
    """Or the next resumption would go back to the store this one was copied from."""
    out, states, copy = tmp_path / "out", tmp_path / "states", tmp_path / "copy"
    with pytest.raises(Stop):
        train_to_directory(
            "digits", out, OPTIONS, checkpoint_every=2, state=states, on_step=stop_at(2)
        )
    shutil.copytree(states, copy)
    with pytest.raises(Stop):
        train_to_directory("digits", out, OPTIONS, resume=True, state=copy, on_step=stop_at(4))
    assert TrainingDirectory(out).keeper().newest().name == "step-4.safetensors"


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    states = tmp_path / "states"
    train_to_directory("digits", tmp_path / "run", OPTIONS, checkpoint_every=3, state=states)
    damage(states, "run/step-6")
    keeper = TrainingDirectory(tmp_path / "run").keeper(scratch=tmp_path / "scratch")
    assert keeper.newest().name == "step-3.safetensors"
    damage(states, "run/step-3")
    with pytest.raises(CheckpointError, match="no sound checkpoint of run 'run'"):
        keeper.newest()


def test_a_run_says_that_it_goes_on_from_what_a_store_has_left(tmp_path: Path) -> None:
    """It went on from an earlier step without a word."""
    out, states, copy = tmp_path / "run", tmp_path / "states", tmp_path / "copy"
    with pytest.raises(Stop):
        train_to_directory(
            "digits", out, OPTIONS, checkpoint_every=2, state=states, on_step=stop_at(4)
        )
    with Store.open(states):
        train_to_directory("digits", out, OPTIONS, resume=True)
        shutil.copytree(states, copy)
    (copy / "index.db-wal").unlink()
    (copy / "index.db-shm").unlink()
    notes: list[str] = []
    train_to_directory("digits", out, OPTIONS, resume=True, state=copy, on_note=notes.append)
    assert "was acknowledged and is not in the index" in notes[0]
    assert notes[0].endswith(". The run goes on from run/step-4.")


def test_a_run_that_was_stopped_before_its_first_checkpoint_is_told_from_a_damaged_one(
    tmp_path: Path,
) -> None:
    keeper = StateCheckpoints(tmp_path / "states", "run", tmp_path / "scratch")
    keeper.begin()
    with pytest.raises(CheckpointError, match=r"no checkpoint of run 'run'.*in a new directory"):
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


def test_runs_of_one_name_that_began_at_once_keep_what_was_first(tmp_path: Path) -> None:
    states = tmp_path / "states"
    other = TrainOptions(steps=6, batch_size=16, seed=7)

    def begin_another(record: StepRecord, _: int) -> None:
        if record.step == 0:
            train_to_directory("digits", tmp_path / "b/run", other, state=states)

    with pytest.raises(CheckpointError, match=r"another run 'run' \(run/step-6\)"):
        train_to_directory(
            "digits", tmp_path / "a/run", OPTIONS, state=states, on_step=begin_another
        )
    assert names(states) == ["run/metrics", "run/package", "run/step-6"]
    with pytest.raises(CheckpointError, match="another run 'run'"):
        train_to_directory("digits", tmp_path / "a/run", OPTIONS, resume=True)
    assert train_to_directory("digits", tmp_path / "b/run", other, resume=True)["seed"] == 7


def test_commits_of_other_runs_do_not_keep_a_checkpoint_out(tmp_path: Path) -> None:
    states = tmp_path / "states"

    def commit_beside(record: StepRecord, _: int) -> None:
        with Store.open(states) as store:
            state = NewState(phase="phase5", kind="metrics", name=f"s{record.step}", files={})
            store.commit([state])

    train_to_directory("digits", tmp_path / "run", OPTIONS, state=states, on_step=commit_beside)
    assert {"run/step-6", "s0", "s5"} <= set(names(states))


def test_a_run_of_an_earlier_build_goes_on_in_its_store(tmp_path: Path) -> None:
    """Neither its training.json nor its states say which run they are of."""
    out, states = tmp_path / "run", tmp_path / "states"
    with pytest.raises(Stop):
        train_to_directory(
            "digits", out, OPTIONS, checkpoint_every=2, state=states, on_step=stop_at(4)
        )
    saved = json.loads((out / "training.json").read_bytes())
    del saved["run"]
    (out / "training.json").write_text(json.dumps(saved))
    with Store.open(states) as store:
        for state in store.list(phase="phase5", kind="checkpoint"):
            metadata = {key: value for key, value in state.metadata.items() if key != "run"}
            fields = {"phase": state.phase, "kind": state.kind, "name": state.name}
            store.commit([NewState(**fields, files=dict(state.files), metadata=metadata)])
    assert train_to_directory("digits", out, OPTIONS, resume=True)["steps"] == 6


@pytest.mark.parametrize("name", ["n" * 250, os.fsdecode(b"bad\xff")])
def test_a_name_no_store_takes_is_refused_before_it_trains(tmp_path: Path, name: str) -> None:
    seen: list[StepRecord] = []
    with pytest.raises(CheckpointError, match="cannot keep a run under the name"):
        train_to_directory(
            "digits",
            tmp_path / name,
            OPTIONS,
            state=tmp_path / "states",
            on_step=lambda record, _: seen.append(record),
        )
    assert not seen
    assert not list(tmp_path.iterdir())


def test_a_state_that_is_named_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    states = tmp_path / "states"
    train_to_directory("digits", tmp_path / "run", OPTIONS, state=states)
    with Store.open(states) as store:
        state = NewState(phase="phase5", kind="checkpoint", name="run/step-final", files={})
        store.commit([state])
    assert train_to_directory("digits", tmp_path / "run", OPTIONS, resume=True)["steps"] == 6


def test_starting_from_a_run_leaves_its_directory_alone(tmp_path: Path) -> None:
    """Its checkpoints are in a store; it may be read-only, or another process may train there."""
    states = tmp_path / "states"
    train_to_directory("digits", tmp_path / "run", OPTIONS, state=states)
    scratch = tmp_path / "run/.checkpoint"
    scratch.touch()  # Nothing can be made below it.
    before = sorted(tmp_path.joinpath("run").rglob("*"))
    train_to_directory("digits", tmp_path / "on", OPTIONS, from_checkpoint=tmp_path / "run")
    assert sorted(tmp_path.joinpath("run").rglob("*")) == before


def test_a_damaged_state_is_said_when_the_run_goes_on_from_the_one_before(tmp_path: Path) -> None:
    out, states, said = tmp_path / "run", tmp_path / "states", []
    result = train_to_directory("digits", out, OPTIONS, checkpoint_every=3, state=states)
    damage(states, "run/step-6")
    again = train_to_directory("digits", out, OPTIONS, resume=True, on_note=said.append)
    assert again == result
    assert len(said) == 1
    assert "The run goes on from run/step-3." in said[0]


def test_a_sealed_store_is_refused_before_it_trains(tmp_path: Path) -> None:
    states = tmp_path / "states"
    content = NewState(phase="phase5", kind="model", name="m", files={"data": b"x"})
    with Store.open(states, sealer=KeyringSealer(Keyring.new())) as store:
        store.commit([content])
    with pytest.raises(ForgeError, match="sealed contents and was opened without a key"):
        train_to_directory("digits", tmp_path / "run", OPTIONS, state=states)
    assert not (tmp_path / "run").exists()


def test_looking_whether_a_store_can_be_written_writes_nothing(tmp_path: Path) -> None:
    states = tmp_path / "states"
    TrainingDirectory(tmp_path / "run").keeper(states).begin()
    with Store.open(states) as store:
        assert store.generations() == []
