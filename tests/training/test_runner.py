from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from forge_harness.cli.train import train_command
from forge_harness.errors import (
    ConfigError,
    DamagedCheckpointError,
    ForgeError,
    NonFiniteError,
    UsageError,
)
from forge_harness.model import ByteLM, ByteLMConfig, DigitsConfig, DigitsModel
from forge_harness.paths import fixtures_dir
from forge_harness.protocols import Precision, TrainOptions
from forge_harness.quant import TernaryLinearOp, absmean_ternary
from forge_harness.training import (
    CheckpointError,
    QATSession,
    TrainingInterrupted,
    evaluate_package,
    newest_checkpoint,
    train_to_directory,
)
from forge_harness.training.checkpoint import read_checkpoint
from forge_harness.training.keeping import DirectoryCheckpoints
from forge_harness.training.randomness import RandomState
from forge_harness.training.run_directory import TrainingDirectory

from .runs import OPTIONS, interrupt_at, lines


def test_directory_of_a_run(tmp_path: Path) -> None:
    result = train_to_directory("digits", tmp_path / "run", OPTIONS, checkpoint_every=2)
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(6))
    assert all(isinstance(row["loss"], float) for row in rows)
    assert json.loads((tmp_path / "run/metrics.json").read_bytes()) == result
    quality = evaluate_package("digits", tmp_path / "run/package")
    assert quality == {"loss": result["loss"], "accuracy": result["accuracy"]}
    kept = [path.name for path in (DirectoryCheckpoints(tmp_path / "run/checkpoints")).files()]
    assert kept == ["step-4.safetensors", "step-6.safetensors"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    out, said = tmp_path / "run", []
    result = train_to_directory("digits", out, OPTIONS, checkpoint_every=3)
    newest = out / "checkpoints/step-6.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = train_to_directory("digits", out, OPTIONS, resume=True, on_note=said.append)
    assert again == result
    assert len(lines(out)) == 6
    assert len(said) == 1
    assert said[0].startswith("step-6.safetensors is ")
    assert said[0].endswith("The run goes on from step-3.safetensors.")
    for file in (out / "checkpoints").iterdir():
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-6\.safetensors is not a checkpoint"):
        train_to_directory("digits", out, OPTIONS, resume=True)


def test_what_killed_writes_left_is_gone_when_the_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_to_directory("digits", out, OPTIONS)
    left = [
        out / "checkpoints/.step-6.safetensors.41-0123abcd.partial",
        out / ".metrics.json.41-0123abcd.partial",
        out / ".package.41-0123abcd.partial",
    ]
    left[0].touch()
    left[1].touch()
    left[2].mkdir()
    (left[2] / "model.safetensors").touch()
    mine = out / ".mine.partial"
    mine.touch()
    train_to_directory("digits", out, OPTIONS, resume=True)
    assert not [path for path in left if path.exists()]
    assert mine.exists()


def test_a_run_that_was_stopped_before_its_first_checkpoint_says_so(tmp_path: Path) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_to_directory("digits", tmp_path / "run", OPTIONS, on_step=die)
    with pytest.raises(CheckpointError, match="stopped before its first; start it again in a new"):
        train_to_directory("digits", tmp_path / "run", OPTIONS, resume=True)


def test_newest_checkpoint_is_chosen_by_step(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step-100", "step-9", "step-10", "step-x"):
        (folder / f"{name}.safetensors").touch()
    (folder / ".step-200.safetensors.1.partial").touch()
    assert newest_checkpoint(tmp_path).name == "step-100.safetensors"


def test_fine_tuning_from_the_directory_of_a_full_precision_run(tmp_path: Path) -> None:
    full = TrainOptions(steps=40, precision="full")
    train_to_directory("digits", tmp_path / "full", full)
    assert not (tmp_path / "full/package").exists()
    short = TrainOptions(steps=8, learning_rate=1e-3)
    tuned = train_to_directory(
        "digits", tmp_path / "tuned", short, from_checkpoint=tmp_path / "full"
    )
    scratch = train_to_directory("digits", tmp_path / "scratch", short)
    assert tuned["accuracy"] > scratch["accuracy"] + 0.05


@pytest.mark.parametrize("kind", ["v1.0", "v0.9", "legacy", "custom"])
def test_training_starts_from_a_checkpoint_of_any_format_and_resumes(
    tmp_path: Path, kind: str
) -> None:
    source = fixtures_dir() / "models" / kind
    options = TrainOptions(steps=4, learning_rate=1e-9)
    seen = []
    train_to_directory(
        "digits",
        tmp_path / "run",
        options,
        from_checkpoint=source,
        on_step=lambda record, _: seen.append(record.loss),
    )
    # From scratch the loss is that of guessing one of ten, 2.3.
    assert seen[0] < 1.0
    model = json.loads((tmp_path / "run/training.json").read_bytes())["model"]
    assert model["family"] == "digits"
    # Resumed, the run builds the checkpoint's model again, whatever the defaults are.
    again = train_to_directory("digits", tmp_path / "run", options, resume=True)
    assert again["steps"] == 4


def test_a_start_of_another_size_or_task_is_told_from_the_checkpoint(tmp_path: Path) -> None:
    small = DigitsConfig(width=32, hidden=32, blocks=1)

    def build(task: str, seed: int, precision: Precision) -> DigitsModel:
        return DigitsModel(small, precision=precision)

    train_to_directory("digits", tmp_path / "small", OPTIONS, build_model=build)
    package = tmp_path / "small/package"
    grown = train_to_directory("digits", tmp_path / "on", OPTIONS, from_checkpoint=package)
    assert grown["parameters"] == sum(p.numel() for p in DigitsModel(small).parameters())
    assert train_to_directory("digits", tmp_path / "on", OPTIONS, resume=True) == grown
    with pytest.raises(ConfigError, match="the checkpoint holds a digits model"):
        train_to_directory("bytes", tmp_path / "text", OPTIONS, from_checkpoint=package)
    assert not (tmp_path / "text").exists()
    (tmp_path / "on/training.json").write_text(
        (tmp_path / "on/training.json").read_text().replace('"config"', '"konfig"')
    )
    with pytest.raises(UsageError, match="does not say what model"):
        train_to_directory("digits", tmp_path / "on", OPTIONS, resume=True)


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ("native-digits", "its model has inputs 16, and the data of 'digits' ask for 64"),
        ("hf-packed-without-config", "does not say that it holds a model of digits or byte-lm"),
        ("gguf-i2_s-arm", "does not say that it holds a model of digits or byte-lm"),
    ],
)
def test_a_start_that_no_task_has_data_for_is_refused(
    checkpoint: str, said: str, tmp_path: Path
) -> None:
    """One was an internal error at the first step; for the others an option was advised."""
    source = fixtures_dir() / "checkpoints" / checkpoint
    with pytest.raises(UsageError, match=said):
        train_to_directory("digits", tmp_path / "on", OPTIONS, from_checkpoint=source)


def test_what_does_not_fit_is_told_in_a_sentence_however_large_the_model_is(tmp_path: Path) -> None:
    def deep(task: str, seed: int, precision: Precision) -> DigitsModel:
        return DigitsModel(DigitsConfig(width=32, hidden=32, blocks=24), precision=precision)

    train_to_directory("digits", tmp_path / "run", TrainOptions(steps=1, batch_size=2))
    with pytest.raises(
        CheckpointError, match=r"do not fit the model of 'digits': .* \.\.\.$"
    ) as told:
        train_to_directory(
            "digits",
            tmp_path / "on",
            OPTIONS,
            from_checkpoint=tmp_path / "run",
            build_model=deep,
        )
    assert len(str(told.value)) < 600


def two_heads(task: str, seed: int, precision: Precision) -> ByteLM:
    with RandomState(seed).active():
        return ByteLM(ByteLMConfig(width=32, heads=2, hidden=32, layers=1), precision=precision)


def foreign(task: str, seed: int, precision: Precision) -> DigitsModel:
    linear = TernaryLinearOp(quantize_weight=lambda w: absmean_ternary(w * 2))
    return DigitsModel(linear=linear, precision=precision)


def test_a_run_is_resumed_with_its_own_model_and_no_other(tmp_path: Path) -> None:
    """Heads change no shape: the weights of another model fit."""
    options = TrainOptions(steps=4, batch_size=2)
    through = train_to_directory("bytes", tmp_path / "through", options, build_model=two_heads)
    with pytest.raises(TrainingInterrupted):
        train_to_directory(
            "bytes",
            tmp_path / "run",
            options,
            build_model=two_heads,
            on_step=interrupt_at(1, signal.SIGINT),
        )
    more = ByteLMConfig(width=32, heads=4, hidden=32, layers=1)
    with pytest.raises(CheckpointError, match=r"saved with model\.config\.heads 2, and 4 was"):
        train_to_directory(
            "bytes",
            tmp_path / "run",
            options,
            resume=True,
            build_model=lambda task, seed, precision: ByteLM(more, precision=precision),
        )
    assert train_to_directory("bytes", tmp_path / "run", options, resume=True) == through
    _, ours = read_checkpoint(newest_checkpoint(tmp_path / "run"))
    _, theirs = read_checkpoint(newest_checkpoint(tmp_path / "through"))
    assert all(torch.equal(ours[k].nan_to_num(), theirs[k].nan_to_num()) for k in theirs)


def test_fine_tuning_takes_the_model_of_the_run_it_starts_from(tmp_path: Path) -> None:
    full = TrainOptions(steps=1, batch_size=2, precision="full")
    train_to_directory("bytes", tmp_path / "full", full, build_model=two_heads)
    options = TrainOptions(steps=1, batch_size=2)
    train_to_directory("bytes", tmp_path / "tuned", options, from_checkpoint=tmp_path / "full")
    config = json.loads((tmp_path / "tuned/training.json").read_bytes())["model"]["config"]
    assert (config["heads"], config["width"]) == (2, 32)


def test_arithmetic_of_ones_own_is_resumed_by_who_has_it(tmp_path: Path) -> None:
    train_to_directory("digits", tmp_path / "run", OPTIONS, build_model=foreign)
    with pytest.raises(UsageError, match="arithmetic of its own; give the build_model"):
        train_to_directory("digits", tmp_path / "run", OPTIONS, resume=True)
    train_to_directory("digits", tmp_path / "run", OPTIONS, resume=True, build_model=foreign)


def test_a_run_of_an_earlier_build_is_resumed_with_the_model_that_is_given(tmp_path: Path) -> None:
    train_to_directory("digits", tmp_path / "run", OPTIONS)
    file = tmp_path / "run/training.json"
    saved = json.loads(file.read_bytes())
    assert saved.pop("model")["config"]["width"] == 64
    file.write_text(json.dumps(saved))
    assert TrainingDirectory(tmp_path / "run").build_model() is None
    assert train_to_directory("digits", tmp_path / "run", OPTIONS, resume=True)["steps"] == 6


def test_steps_are_on_disk_before_the_checkpoint_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, save = os.fsync, DirectoryCheckpoints.save

    def noted_sync(descriptor: int) -> None:
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def noted_save(self: DirectoryCheckpoints, session: QATSession) -> None:
        assert calls[-2:] == ["metrics.jsonl", "run"]
        assert len(lines(tmp_path / "run")) == session.step_index
        calls.append("checkpoint")
        save(self, session)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(DirectoryCheckpoints, "save", noted_save)
    train_to_directory("digits", tmp_path / "run", OPTIONS, checkpoint_every=4)
    assert calls.count("checkpoint") == 2


def test_a_damaged_package_is_no_start(tmp_path: Path) -> None:
    package = shutil.copytree(fixtures_dir() / "models/v1.0", tmp_path / "package")
    weights = bytearray((package / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (package / "model.safetensors").write_bytes(weights)
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors"):
        train_to_directory("digits", tmp_path / "run", OPTIONS, from_checkpoint=package)
    assert not (tmp_path / "run").exists()


def test_bad_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(UsageError, match="is not empty"):
        train_to_directory("digits", tmp_path, OPTIONS)
    with pytest.raises(UsageError, match="is not empty"):
        train_to_directory("digits", tmp_path / "something", OPTIONS)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        train_to_directory("digits", tmp_path, OPTIONS, resume=True)
    with pytest.raises(UsageError, match="holds no training run"):
        TrainingDirectory(tmp_path).options()
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        train_to_directory("digits", tmp_path / "new", OPTIONS, from_checkpoint=tmp_path / "no")


def test_nan_ends_the_run_with_a_checkpoint_from_before(tmp_path: Path) -> None:
    def loss(model, batch):
        return model(batch.inputs).sum() * float("nan")

    with pytest.raises(NonFiniteError) as caught:
        train_to_directory("digits", tmp_path / "run", OPTIONS, loss=loss)
    assert caught.value.exit_code == 1  # Measured and violated; no internal error.
    assert newest_checkpoint(tmp_path / "run").name == "step-0.safetensors"


class Overflows(DigitsModel):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return logits if self.training else logits * float("nan")


def test_a_held_out_loss_that_is_not_finite_ends_the_run_as_one_in_training(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="After 6 steps the held-out loss is nan"):
        train_to_directory("digits", tmp_path / "run", OPTIONS, build_model=lambda *_: Overflows())
    assert newest_checkpoint(tmp_path / "run").name == "step-6.safetensors"
    assert not (tmp_path / "run/metrics.json").exists()


def test_refused_write_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ForgeError, match="No space left on device; free space") as caught:
        train_to_directory("digits", tmp_path / "run", OPTIONS)
    assert caught.value.exit_code == 4


def invoke(*arguments: str):
    return CliRunner().invoke(train_command, list(arguments), standalone_mode=False)


def test_command_trains_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("--task", "digits", "--steps", "20", "--seed", "3", "--out", "run")
    assert result.exception is None, result.exception
    assert result.return_value == 0
    assert result.stdout.startswith("digits ternary: accuracy ")
    assert result.stderr.count("step ") == 10
    assert TrainingDirectory(tmp_path / "run").options()[1].seed == 3


def test_command_resumes_only_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingInterrupted):
        train_to_directory(
            "digits", tmp_path / "run", OPTIONS, on_step=interrupt_at(1, signal.SIGINT)
        )
    other = invoke("--resume", "--out", "run", "--steps", "7")
    assert isinstance(other.exception, UsageError)
    assert "has steps 6, and 7 was asked for" in str(other.exception)
    assert invoke("--resume", "--out", "run", "--steps", "6").return_value == 0
    assert invoke("--resume", "--out", "run", "--checkpoint-every", "5").return_value == 0
    assert invoke("--resume", "--out", "run").return_value == 0
    assert TrainingDirectory(tmp_path / "run").checkpoint_every() == 5
    # Of the recipe, and not given when the run began.
    assert invoke("--resume", "--out", "run", "--learning-rate", "0.003").return_value == 0
    more = invoke("--resume", "--out", "run", "--learning-rate", "0.004")
    assert "has learning_rate 0.003, and 0.004 was asked for" in str(more.exception)
    assert len(lines(tmp_path / "run")) == 6


def test_command_says_what_a_resumed_run_leaves_out_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("--steps", "2", "--out", "run").exception is None
    # What the run began with, though no option said so then.
    same = invoke("--resume", "--out", "run", "--compute", "exact")
    assert (same.exception, same.stderr) == (None, "")
    # Flags may have gone over this file when the run began.
    (tmp_path / "forge.toml").write_text("[train]\nsteps = 9\nwarmup_steps = 0\n")
    monkeypatch.setenv("FORGE_HARNESS_RUN_SEED", "5")
    result = invoke("--resume", "--out", "run", "--steps", "2")
    assert result.exception is None
    assert result.stderr.splitlines() == [
        "run.seed is 5 in the environment (FORGE_HARNESS_RUN_SEED); the run in run goes on with 0, "
        "as it was started."
    ]
    said = invoke("--resume", "--out", "run").stderr
    assert "train.steps is 9 in forge.toml; the run in run goes on with 2, as" in said


def test_command_builds_the_configured_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "forge.toml").write_text("[model]\nwidth = 32\nhidden = 48\nlayers = 1\n")
    assert invoke("--steps", "2", "--out", "run").exception is None
    result = json.loads((tmp_path / "run/metrics.json").read_bytes())
    assert result["parameters"] == 32 * 74 + 2 * 32 * 48 + 32 + 48


def test_command_resumes_the_configured_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = "[model]\nwidth = 32\nheads = 2\nhidden = 48\nlayers = 1\n"
    (tmp_path / "h.toml").write_text(sizes)
    first = ("--task", "bytes", "--steps", "2", "--batch-size", "2", "--out", "run")
    assert invoke(*first, "--config", "h.toml").exception is None
    for more in ((), ("--config", "h.toml")):
        result = invoke("--resume", "--out", "run", *more)
        assert result.exception is None, result.exception
        model = json.loads((tmp_path / "run/training.json").read_bytes())["model"]
        assert (model["family"], model["config"]["heads"]) == ("byte-lm", 2)
    monkeypatch.setenv("FORGE_HARNESS_MODEL_HEADS", "4")
    other = invoke("--resume", "--out", "run")
    assert isinstance(other.exception, UsageError)
    assert "trains a model with heads 2, and the configuration has model.heads 4" in str(
        other.exception
    )


def test_command_resumes_a_digits_model_of_a_number_of_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "forge.toml").write_text("[model]\nlayers = 1\n")
    assert invoke("--steps", "2", "--out", "run").exception is None
    assert invoke("--resume", "--out", "run").exception is None
    (tmp_path / "forge.toml").write_text("[model]\nlayers = 2\n")
    assert "a model with layers 1" in str(invoke("--resume", "--out", "run").exception)
