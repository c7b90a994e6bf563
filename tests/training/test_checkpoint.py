from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from forge_harness.protocols import Precision, TrainOptions
from forge_harness.training import (
    CheckpointError,
    QATSession,
    model_weights,
    reference_model,
    resume_session,
    save_session,
)
from forge_harness.training.checkpoint import read_checkpoint

# 1437 samples an epoch: the fourth batch of 400 is partial, and the fifth is of epoch 1.
LONG = TrainOptions(steps=8, batch_size=400, accumulation=2)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype
        and torch.equal(torch.nan_to_num(left[key]), torch.nan_to_num(right[key]))
        for key in left
    )


def with_dropout(task: str, seed: int, precision: Precision) -> nn.Module:
    """A model that draws random numbers in every forward."""
    model = reference_model(task, seed, precision)
    return nn.Sequential(nn.Dropout(0.2), model)


@pytest.mark.parametrize("interruptions", [(3,), (1, 4, 5), (0, 8)])
@pytest.mark.parametrize("build_model", [None, with_dropout])
def test_interrupted_runs_end_bit_identical(
    tmp_path: Path,
    interruptions: tuple[int, ...],
    build_model: Callable[[str, int, Precision], nn.Module] | None,
) -> None:
    through = QATSession("digits", LONG, build_model=build_model)
    records = [through.step() for _ in range(LONG.steps)]
    session = QATSession("digits", LONG, build_model=build_model)
    resumed = []
    path = tmp_path / "run.safetensors"
    for stop in (*interruptions, LONG.steps):
        while session.step_index < stop:
            resumed.append(session.step())
        save_session(session, path)
        live = session.state_tensors()
        torch.manual_seed(stop)  # The process that resumes has random states of its own.
        session = resume_session("digits", LONG, path, build_model=build_model)
        assert same(session.state_tensors(), live)
    assert same(session.state_tensors(), through.state_tensors())
    assert [r.sample_ids for r in resumed] == [r.sample_ids for r in records]
    assert [(r.loss, r.grad_norm, r.learning_rate) for r in resumed] == [
        (r.loss, r.grad_norm, r.learning_rate) for r in records
    ]


def test_language_model_resumes_with_its_weights_tied(tmp_path: Path) -> None:
    options = TrainOptions(steps=3, batch_size=2)
    through = QATSession("bytes#small", options)
    session = QATSession("bytes#small", options)
    for each in (through, through, through, session):
        each.step()
    save_session(session, tmp_path / "lm")
    header, _ = read_checkpoint(tmp_path / "lm")
    assert header["tied"] == {"model.head.weight": "model.embedding.weight"}
    resumed = resume_session("bytes#small", options, tmp_path / "lm")
    resumed.step()
    resumed.step()
    assert resumed.model.head.weight is resumed.model.embedding.weight
    assert same(resumed.state_tensors(), through.state_tensors())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    session = QATSession("digits", LONG)
    session.step()
    save_session(session, tmp_path / "step-1.safetensors")
    return tmp_path / "step-1.safetensors"


def test_every_optimizer_field_is_saved_with_its_dtype(saved: Path) -> None:
    _, tensors = read_checkpoint(saved)
    fields = {k.rpartition("/")[2] for k in tensors if k.startswith("optimizer.")}
    assert fields == {"step", "exp_avg", "exp_avg_sq"}
    assert tensors["model.stem.weight"].dtype == torch.float32
    assert {"random.torch", "random.numpy", "random.python", "position"} <= set(tensors)


@pytest.mark.parametrize(
    ("task", "options", "what"),
    [
        ("digits#1", LONG, "task 'digits'"),
        ("digits", TrainOptions(steps=9, batch_size=400, accumulation=2), "steps 8"),
        ("digits", TrainOptions(steps=8, batch_size=400), "accumulation 2"),
        ("digits", TrainOptions(steps=8, batch_size=400, accumulation=2, seed=1), "seed 0"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    saved: Path, task: str, options: TrainOptions, what: str
) -> None:
    with pytest.raises(CheckpointError, match=f"was saved with {what}"):
        resume_session(task, options, saved)


def test_checkpoint_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit the model"):
        resume_session("digits", LONG, saved, build_model=with_dropout)


def test_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        resume_session("digits", LONG, tmp_path / "none")


def test_any_flipped_byte_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    for place in (0, 9, 200, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            resume_session("digits", LONG, saved)


@pytest.mark.parametrize("length", [0, 7, 4000])
def test_truncated_checkpoint_is_refused(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="damaged"):
        resume_session("digits", LONG, saved)


def test_fine_tuning_starts_from_full_precision_weights(tmp_path: Path) -> None:
    source = QATSession("digits", TrainOptions(steps=2, precision="full"))
    source.step()
    save_session(source, tmp_path / "full")
    tuned = QATSession(
        "digits", TrainOptions(steps=2), initial_weights=model_weights(tmp_path / "full")
    )
    assert same(dict(tuned.model.state_dict()), dict(source.model.state_dict()))
    assert tuned.step().loss > 0
