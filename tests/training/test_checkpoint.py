from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from forge_harness.errors import UsageError
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
    with pytest.raises(CheckpointError, match="was saved with model 'digits', and None was asked"):
        resume_session("digits", LONG, saved, build_model=with_dropout)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def wide(task: str, seed: int, precision: Precision) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 11))

    def narrow(task: str, seed: int, precision: Precision) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 10))

    save_session(QATSession("digits", LONG, build_model=wide), tmp_path / "own")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        resume_session("digits", LONG, tmp_path / "own", build_model=narrow)


class OfOnesOwn(nn.Module):
    """A convolution laid out as kernels like it, and buffers no state dict has."""

    seen: Tensor
    rotation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1).to(memory_format=torch.channels_last)
        self.deep = nn.Conv2d(6, 6, 3, padding=1).to(memory_format=torch.channels_last)
        self.head = nn.Linear(6, 10)
        self.register_buffer("seen", torch.ones(6), persistent=False)
        self.register_buffer("rotation", torch.ones(3, dtype=torch.complex64), persistent=False)
        self.register_buffer("grown", None, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.deep(self.conv(pixels.reshape(-1, 1, 8, 8))).relu().mean((2, 3))
        if self.training:
            self.seen.mul_(0.9).add_(0.1 * x.detach().mean(0))
            self.rotation *= 1j
            self.grown = torch.full((int(self.rotation[0].abs() + 2),), float(self.seen.sum()))
            x = x * self.grown.mean()
        return self.head(x / (self.seen + 1))


def of_ones_own(task: str, seed: int, precision: Precision) -> nn.Module:
    return OfOnesOwn()


def test_a_model_of_ones_own_resumes_bit_identical(tmp_path: Path) -> None:
    options = TrainOptions(steps=6, batch_size=16)
    through = QATSession("digits", options, build_model=of_ones_own)
    session = QATSession("digits", options, build_model=of_ones_own)
    losses = [through.step().loss for _ in range(6)]
    resumed = [session.step().loss for _ in range(3)]
    save_session(session, tmp_path / "own")
    session = resume_session("digits", options, tmp_path / "own", build_model=of_ones_own)
    weight = session.model.deep.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert session.optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert resumed + [session.step().loss for _ in range(3)] == losses
    assert same(session.state_tensors(), through.state_tensors())
    assert torch.equal(session.model.rotation, through.model.rotation)


class ExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 0}

    def set_extra_state(self, state: object) -> None: ...


class SparseBuffer(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("mask", torch.eye(3).to_sparse())


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (ExtraState, "holds a dict as '0._extra_state'"),
        (SparseBuffer, "holds a tensor of torch.float32, torch.sparse_coo as '0.mask'"),
    ],
)
def test_state_no_checkpoint_holds_is_refused_before_the_first_step(
    layer: type[nn.Linear], what: str
) -> None:
    def build(task: str, seed: int, precision: Precision) -> nn.Module:
        return nn.Sequential(layer(64, 10))

    with pytest.raises(UsageError, match=what) as caught:
        QATSession("digits", LONG, build_model=build)
    assert "\n" not in str(caught.value)


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the header of a checkpoint, with the header's own digest made anew."""
    with safe_open(path, framework="pt") as stream:
        header = json.loads(stream.metadata()["forge"])
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    changed = change(header)
    header = header if changed is None else changed
    if isinstance(header, dict):
        header.pop("header", None)
    path.write_bytes(save(tensors, metadata={"forge": json.dumps(header)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("digest") and None,
        lambda header: header.pop("tied") and None,
        lambda header: header.pop("identity") and None,
        lambda header: header.update(tied={"a": "nope"}),
        lambda header: header.update(tied={"position": "random.torch"}),
        lambda header: header.update(tied={"a": ["position"]}),
        lambda header: header.update(identity=[]),
        lambda header: header.update(format=2),
        lambda header: [1],
    ],
)
def test_a_header_that_is_none_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    rewritten(saved, change)
    with pytest.raises(CheckpointError, match="is not a checkpoint, or it is damaged"):
        resume_session("digits", LONG, saved)
    with pytest.raises(CheckpointError):
        model_weights(saved)


def test_a_changed_header_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    assert b'\\"steps\\":8' in content
    saved.write_bytes(content.replace(b'\\"steps\\":8', b'\\"steps\\":9'))
    with pytest.raises(CheckpointError, match="its header does not have the digest in it"):
        read_checkpoint(saved)


def test_checkpoints_of_earlier_builds_are_resumed(saved: Path) -> None:
    """They say nothing of the model, and their header has no digest."""
    live = resume_session("digits", LONG, saved).state_tensors()
    rewritten(saved, lambda header: header["identity"].pop("model") and None)
    assert same(resume_session("digits", LONG, saved).state_tensors(), live)


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
