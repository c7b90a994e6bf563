"""Sessions that are taken up again with something lost or changed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forge_harness.drill import observe
from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.drill.defects.sessions import (
    SessionDefect,
    of_text,
    round_to_bf16,
    ternary_layers,
)
from forge_harness.protocols import TrainOptions
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.training import QATSession

RESUME, TWICE = "training.resume_bit_identical", "training.resume_twice_bit_identical"
OPTIMIZER, SAVED = "training.optimizer_state_exact", "training.every_state_saved"


def _drops_moments(session: Any) -> None:
    session.optimizer.state.clear()


def _restarts_epoch(session: Any) -> None:
    session.position.epoch = 0


def _skips_a_sample(session: Any) -> None:
    session.position.advance(1)


def _restarts_data(session: Any) -> None:
    session.position.epoch = session.position.offset = 0


def _repeats_warmup(session: Any) -> None:
    session.schedule = replace(session.schedule, warmup_steps=session.step_index + 3)


def _plans_what_is_left(session: Any) -> None:
    left = session.schedule.total_steps - session.step_index
    session.schedule = replace(session.schedule, total_steps=max(left, session.step_index + 1))


def _moments_in_bf16(session: Any) -> None:
    for entry in session.optimizer.state.values():
        entry["exp_avg"] = entry["exp_avg"].bfloat16()


def _moments_rounded(session: Any) -> None:
    for entry in session.optimizer.state.values():
        entry["exp_avg"] = entry["exp_avg"].bfloat16().float()


def _forgets_betas(session: Any) -> None:
    for group in session.optimizer.param_groups:
        group["betas"] = (0.9, 0.999)


def _fresh_generators(session: Any) -> None:
    session.random = QATSession(session.task, replace(session.options, seed=77)).random


@torch.no_grad()
def _layer_left_at_init(session: Any) -> None:
    """The key of one layer was renamed, and what is missing is no error."""
    generator = torch.Generator().manual_seed(77)
    weight = ternary_layers(session.model)[-1].weight
    nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)


def _hides_optimizer(session: Any) -> None:
    full: Callable[[], dict[str, Tensor]] = session.state_tensors
    session.state_tensors = lambda: {
        name: tensor for name, tensor in full().items() if not name.startswith("optimizer")
    }


class _TornSnapshot(ReferenceSubject):
    """Writes the checkpoint when it is read: the tensors are those of a later step."""

    saved: Any = None

    def save_session(self, session: Any, path: Path) -> None:
        self.saved = session

    def resume_session(self, task: str, options: TrainOptions, path: Path) -> Any:
        super().save_session(self.saved, path)
        return super().resume_session(task, options, path)


class _UntiesText(ReferenceSubject):
    """The head of a resumed text model is a copy of the embedding it was tied to."""

    def resume_session(self, task: str, options: TrainOptions, path: Path) -> Any:
        session: Any = super().resume_session(task, options, path)
        for kept, alias in self.model_spec(task).tied:
            owner, _, leaf = alias.rpartition(".")
            values = session.model.get_parameter(kept).detach().clone()
            setattr(session.model.get_submodule(owner), leaf, nn.Parameter(values))
        return session


class _SavedByTorch(ReferenceSubject):
    """Checkpoints by torch.save and torch.load, which choose the format by the suffix."""

    def save_session(self, session: Any, path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            inner = Path(folder) / "checkpoint"
            super().save_session(session, inner)
            torch.save(
                {"session": torch.frombuffer(bytearray(inner.read_bytes()), dtype=torch.uint8)},
                path,
            )

    def resume_session(self, task: str, options: TrainOptions, path: Path) -> Any:
        saved = torch.load(path, weights_only=True)["session"]
        with tempfile.TemporaryDirectory() as folder:
            inner = Path(folder) / "checkpoint"
            inner.write_bytes(saved.numpy().tobytes())
            return super().resume_session(task, options, inner)


# What is kept of a run, beside `observe.resumed`


@contextmanager
def saved(subject: Any, steps: int, later: int = 0) -> Iterator[tuple[TrainOptions, Path]]:
    """The checkpoint of a run with eight steps an epoch; `later` more are made after saving."""
    options = TrainOptions(steps=12, batch_size=180)
    session = subject.session("digits", options)
    for _ in range(steps):
        session.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        subject.save_session(session, path)
        for _ in range(later):
            session.step()
        yield options, path


def resumed_later(subject: Any) -> object:
    """What is taken up in the second epoch, after the session that was saved has gone on."""
    with saved(subject, steps=9, later=1) as (options, path):
        session = subject.resume_session("digits", options, path)
        found = dict(session.state_tensors())
        record = session.step()
        return found, record.loss, list(record.sample_ids)


def restored_optimizer(subject: Any) -> object:
    """The moments of a session that was taken up again."""
    with saved(subject, steps=3) as (options, path):
        session = subject.resume_session("digits", options, path)
        return [dict(entry) for entry in session.optimizer.state.values()]


def tied_after_resuming(subject: Any) -> object:
    """Whether the tied weights of a resumed text model are one."""
    options = TrainOptions(steps=2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        subject.save_session(subject.session("bytes", options), path)
        model = subject.resume_session("bytes", options, path).model
    pairs = subject.model_spec("bytes").tied
    return [model.get_parameter(one) is model.get_parameter(two) for one, two in pairs]


def text_resumed(subject: Any) -> object:
    """The state of the text task's session that was taken up again, and its next samples."""
    options = TrainOptions(steps=4, batch_size=2)
    session = subject.session("bytes", options)
    session.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        subject.save_session(session, path)
        again = subject.resume_session("bytes", options, path)
        return dict(again.state_tensors()), list(again.step().sample_ids)


def changed_by_saving(subject: Any) -> object:
    """A session after it was saved."""
    session = subject.session("digits", TrainOptions(steps=4))
    session.step()
    with tempfile.TemporaryDirectory() as folder:
        subject.save_session(session, Path(folder) / "checkpoint")
    return dict(session.state_tensors())


DEFECTS = (
    Defect(
        id="C01_moments_dropped",
        title="The optimizer's moments are not restored",
        stage=Stage.CHECKPOINT,
        check=RESUME,
        shows="first_different_step is",
        subject=lambda: SessionDefect(resumed=_drops_moments),
        alive=observe.resumed,
        source="huggingface/nanotron 013a153c",
        subtlety=3,
    ),
    Defect(
        id="C01_moments_of_text_dropped",
        title="The optimizer's moments of the text task alone are not restored",
        stage=Stage.CHECKPOINT,
        check=RESUME,
        shows="bytes.first_different_step is",
        subject=lambda: SessionDefect(resumed=of_text(_drops_moments)),
        alive=text_resumed,
        source="huggingface/nanotron 013a153c",
        subtlety=4,
    ),
    Defect(
        id="C04_text_restarted",
        title="A resumed text run begins its epoch again",
        stage=Stage.CHECKPOINT,
        check=RESUME,
        shows="bytes.sample_ids is",
        subject=lambda: SessionDefect(resumed=of_text(_restarts_data)),
        alive=text_resumed,
        source="huggingface/accelerate#4071",
        subtlety=4,
    ),
    Defect(
        id="C04_epoch_restarted",
        title="After a resumption the order is that of the first epoch again",
        stage=Stage.CHECKPOINT,
        check=RESUME,
        shows="sample_ids is",
        subject=lambda: SessionDefect(resumed=_restarts_epoch),
        alive=resumed_later,
        source="huggingface/accelerate#4071",
        subtlety=4,
    ),
    Defect(
        id="C07_warmup_repeats",
        title="After a resumption the warm-up begins again",
        stage=Stage.CHECKPOINT,
        check=RESUME,
        shows="first_different_step is",
        subject=lambda: SessionDefect(resumed=_repeats_warmup),
        alive=observe.resumed,
        source="pytorch/torchtitan#275",
        subtlety=3,
    ),
    Defect(
        id="C18_plans_what_is_left",
        title="A resumed run takes the steps that are left for the length of its schedule",
        stage=Stage.CHECKPOINT,
        check=RESUME,
        shows="first_different_step is",
        subject=lambda: SessionDefect(resumed=_plans_what_is_left),
        alive=observe.resumed,
        source="huggingface/nanotron 2f9e7d88",
        subtlety=3,
    ),
    Defect(
        id="C19_latents_rounded",
        title="Latents are taken up from a bf16 copy",
        stage=Stage.CHECKPOINT,
        check=RESUME,
        shows="metrics_at_once is",
        subject=lambda: SessionDefect(resumed=round_to_bf16),
        alive=observe.resumed,
        source="TensorAuto/OpenTau#185",
        subtlety=5,
    ),
    Defect(
        id="C06_sample_lost",
        title="Each resumption loses one sample",
        stage=Stage.CHECKPOINT,
        check=TWICE,
        shows="sample_ids is",
        subject=lambda: SessionDefect(resumed=_skips_a_sample),
        alive=observe.resumed,
        source="pytorch/torchtitan#3008",
        subtlety=5,
    ),
    Defect(
        id="C01_moments_empty",
        title="A resumed optimizer is empty",
        stage=Stage.CHECKPOINT,
        check=OPTIMIZER,
        shows="different_entries is",
        subject=lambda: SessionDefect(resumed=_drops_moments),
        alive=observe.resumed,
        source="huggingface/nanotron 9aedd848",
        subtlety=3,
    ),
    Defect(
        id="C19_moments_in_bf16",
        title="The first moments come back in bf16",
        stage=Stage.CHECKPOINT,
        check=OPTIMIZER,
        shows="different_entries is",
        subject=lambda: SessionDefect(resumed=_moments_in_bf16),
        alive=restored_optimizer,
        source="TensorAuto/OpenTau#185",
        subtlety=5,
    ),
    Defect(
        id="C19_moments_rounded",
        title="The first moments were saved in bf16 and are widened again",
        stage=Stage.CHECKPOINT,
        check=OPTIMIZER,
        shows="different_entries is",
        subject=lambda: SessionDefect(resumed=_moments_rounded),
        alive=observe.resumed,
        source="TensorAuto/OpenTau#185",
        subtlety=5,
    ),
    Defect(
        id="C17_betas_default",
        title="The optimizer's betas come back as its defaults",
        stage=Stage.CHECKPOINT,
        check=OPTIMIZER,
        shows="different_entries is",
        subject=lambda: SessionDefect(resumed=_forgets_betas),
        alive=observe.resumed,
        source="pytorch/torchtitan 95a254200",
        subtlety=4,
    ),
    Defect(
        id="C03_generators_not_restored",
        title="The random state is not restored",
        stage=Stage.CHECKPOINT,
        check=SAVED,
        shows="not_restored is",
        subject=lambda: SessionDefect(resumed=_fresh_generators),
        alive=observe.resumed,
        source="huggingface/transformers#11582",
        subtlety=4,
    ),
    Defect(
        id="C08_state_incomplete",
        title="The state that is declared leaves out the optimizer",
        stage=Stage.CHECKPOINT,
        check=SAVED,
        shows="uncovered_tensors is",
        subject=lambda: SessionDefect(_hides_optimizer),
        alive=observe.resumed,
        source="facebookresearch/metaseq#3",
        subtlety=3,
    ),
    Defect(
        id="C08_changed_by_saving",
        title="Saving rounds the live weights",
        stage=Stage.CHECKPOINT,
        check=SAVED,
        shows="changed_by_saving is",
        subject=lambda: SessionDefect(saving=round_to_bf16),
        alive=changed_by_saving,
        source="mosaicml/composer#1376",
        subtlety=4,
    ),
    Defect(
        id="C13_layer_left_at_init",
        title="A renamed key is no error: one layer of a resumed model stays as it was drawn",
        stage=Stage.CHECKPOINT,
        check=SAVED,
        shows="not_restored is",
        subject=lambda: SessionDefect(resumed=_layer_left_at_init),
        alive=observe.resumed,
        source="NVIDIA-NeMo/Megatron-Bridge#6032",
        subtlety=4,
    ),
    Defect(
        id="C16_untied_on_resume",
        title="The tied head of a resumed text model is a copy, which the optimizer does not move",
        stage=Stage.CHECKPOINT,
        check=RESUME,
        shows="bytes.untied is",
        subject=_UntiesText,
        alive=tied_after_resuming,
        source="huggingface/transformers#38870",
        subtlety=4,
    ),
    Defect(
        id="C20_torn_snapshot",
        title="The checkpoint is written later, from tensors that have moved on",
        stage=Stage.CHECKPOINT,
        check=SAVED,
        shows="not_restored is",
        subject=_TornSnapshot,
        alive=resumed_later,
        source="pytorch/torchtitan#602",
        subtlety=5,
    ),
)

BENIGN = (
    Benign(
        id="saved_by_torch",
        title="Checkpoints are files of torch.save, whatever they are called",
        subject=_SavedByTorch,
        checks=(RESUME, TWICE, OPTIMIZER, SAVED),
    ),
)
