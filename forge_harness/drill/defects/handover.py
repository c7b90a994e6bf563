"""What is handed over between phases and is not what was trained, and runs that do not recover."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from forge_harness import training
from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage
from forge_harness.durable import staged_directory
from forge_harness.formats import ReadOptions, WriteOptions, native
from forge_harness.formats.manifest import MANIFEST, write_manifest
from forge_harness.probes.limits import file_size_limited
from forge_harness.protocols import DataInfo, ServerSpec, TrainingSession, TrainOptions
from forge_harness.subject.reference import ReferenceSubject

WEIGHTS, CLAIMS = "model.safetensors", "metrics.json"


class ExportsScales(ReferenceSubject):
    """Exports scales its own forward does not use.

    Args:
        scale: What becomes of a scale.
    """

    def __init__(self, scale: Callable[[Tensor], Tensor]) -> None:
        self.scale = scale

    def export_package(self, session: TrainingSession, path: Path) -> None:
        """See `ExportsWeights.export_package`."""
        super().export_package(session, path)
        beside = path.with_name(f"{path.name}.changed")
        with native.open_native(path, ReadOptions()) as opened:
            package: Any = opened
            scales = package.scales
            package.scales = lambda name: self.scale(scales(name))
            with staged_directory(beside) as stage:
                native.write_native(package, stage, WriteOptions())
        shutil.rmtree(path)
        beside.rename(path)


class RolledEmbedding(ReferenceSubject):
    """Exports its embedding rolled by one row, as a converter with one special token more does."""

    def export_package(self, session: TrainingSession, path: Path) -> None:
        """See `ExportsWeights.export_package`."""
        live: Any = session
        embedding = getattr(live.model, "embedding", None)
        if embedding is None:
            super().export_package(session, path)
            return
        with torch.no_grad():
            kept = embedding.weight.detach().clone()
            embedding.weight.copy_(kept.roll(1, 0))
            super().export_package(session, path)
            embedding.weight.copy_(kept)


class SwappedRows(ReferenceSubject):
    """Exports each ternary weight with its rows in reverse: the same scales, other codes."""

    def export_package(self, session: TrainingSession, path: Path) -> None:
        """See `ExportsWeights.export_package`."""
        live: Any = session
        latents = list(self.latent_weights(live.model).values())
        with torch.no_grad():
            for is_back in (False, True):
                for latent in latents:
                    latent.copy_(latent.flip(0))
                if not is_back:
                    super().export_package(session, path)


class ServesAnotherPackage(ReferenceSubject):
    """Two rows of the embedding change places in the package that is served."""

    def server(self, directory: Path, *, secured: bool = False) -> ServerSpec:
        """See `Serves.server`."""
        spec = super().server(directory, secured=secured)
        package = directory / "package"
        tensors = load_file(package / WEIGHTS)
        name = next(name for name in tensors if "embedding" in name)
        tensors[name] = torch.roll(tensors[name], 1, 0)
        save_file(tensors, package / WEIGHTS)
        (package / MANIFEST).unlink()
        write_manifest(package)
        return spec


class _HalfTheData(ReferenceSubject):
    def data_info(self, task: str) -> DataInfo:
        info = super().data_info(task)
        return replace(info, validation_size=info.validation_size // 2)


class ScoresHalfTheData(ReferenceSubject):
    """The score of a package is that of the first half of the held-out data."""

    def evaluate_package(self, task: str, path: Path) -> Mapping[str, float]:
        """See `ExportsWeights.evaluate_package`."""
        return training.evaluate_package(task, path, load=_HalfTheData())


class ScoresTheTrainedModel(ReferenceSubject):
    """The score of a package is the one that its training ended with, whatever is in the package.

    A part of the exported weights has the other sign.
    """

    def __init__(self) -> None:
        self._score: Mapping[str, float] | None = None

    def export_package(self, session: TrainingSession, path: Path) -> None:
        """See `ExportsWeights.export_package`."""
        live: Any = session
        self._score = dict(session.evaluate())
        with torch.no_grad():
            latents = list(self.latent_weights(live.model).values())
            kept = [latent.detach().clone() for latent in latents]
            for latent in latents:
                latent[::4].neg_()
            super().export_package(session, path)
            for latent, value in zip(latents, kept, strict=True):
                latent.copy_(value)

    def evaluate_package(self, task: str, path: Path) -> Mapping[str, float]:
        """See `ExportsWeights.evaluate_package`."""
        return self._score or super().evaluate_package(task, path)


class BelievesClaims(ReferenceSubject):
    """A package that states its score has that score, and nothing is computed."""

    def evaluate_package(self, task: str, path: Path) -> Mapping[str, float]:
        """See `ExportsWeights.evaluate_package`."""
        if not (path / CLAIMS).exists():
            return super().evaluate_package(task, path)
        claimed = json.loads((path / CLAIMS).read_bytes())
        return {name: entry["value"] for name, entry in claimed.items()}


class HandsOverLatents(ReferenceSubject):
    """Hands over what training kept: `state_dict()`, in a file that says nothing of the model."""

    def provide_checkpoint(self, directory: Path) -> Path:
        """See `HoldsCheckpoint.provide_checkpoint`."""
        model = self.build_model("digits", seed=0)
        path = directory / "weights.safetensors"
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
        return path


class DigestsAnObject(ReferenceSubject):
    """The digest of the data is that of the representation of an object: its address."""

    def __init__(self) -> None:
        self._made: list[object] = []

    def data_digest(self, task: str) -> str:
        """See `LoadsData.data_digest`."""
        # Kept, or the next one is made at the same address.
        self._made.append(object())
        return f"sha256:{hashlib.sha256(repr(self._made[-1]).encode()).hexdigest()}"


class Restarts(ReferenceSubject):
    """Half a checkpoint is taken as none: training starts over."""

    def resume_session(self, task: str, options: TrainOptions, path: Path) -> TrainingSession:
        """See `Checkpoints.resume_session`."""
        try:
            return super().resume_session(task, options, path)
        except Exception:  # the defect: any broken checkpoint is passed over in silence
            return self.session(task, options)


class ForgetsMomentum(ReferenceSubject):
    """The state of the optimizer is not restored."""

    def resume_session(self, task: str, options: TrainOptions, path: Path) -> TrainingSession:
        """See `Checkpoints.resume_session`."""
        session: Any = super().resume_session(task, options, path)
        session.optimizer.state.clear()
        resumed: TrainingSession = session
        return resumed


class SavesInPlace(ReferenceSubject):
    """Writes over the old checkpoint instead of beside it."""

    def save_session(self, session: TrainingSession, path: Path) -> None:
        """See `Checkpoints.save_session`."""
        if not path.exists():
            super().save_session(session, path)
            return
        beside = path.with_name(f"{path.name}.beside")
        with path.open("r+b") as over:
            over.truncate(0)
            super().save_session(session, beside)
            over.write(beside.read_bytes())
        beside.unlink()


def exported_untrained(subject: Any) -> object:
    """The weights of a byte model that is exported as it was made."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        subject.export_package(subject.session("bytes", TrainOptions(steps=1)), package)
        return (package / WEIGHTS).read_bytes()


def provided(subject: Any) -> object:
    """Names and bytes of the files of the checkpoint it hands over."""
    with tempfile.TemporaryDirectory() as folder:
        path = subject.provide_checkpoint(Path(folder))
        files = [path] if path.is_file() else sorted(path.iterdir())
        return {file.name: file.read_bytes() for file in files}


def scored(subject: Any) -> object:
    """What a package scores beside which somebody wrote that it scores a half."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        subject.export_package(subject.session("digits", TrainOptions(steps=1)), package)
        half = {name: {"value": 0.5, "unit": "1"} for name in ("accuracy", "loss")}
        (package / CLAIMS).write_text(json.dumps(half))
        (package / MANIFEST).unlink()
        write_manifest(package)
        return dict(subject.evaluate_package("digits", package))


def served_weights(subject: Any) -> object:
    """The weights that its server is given."""
    with tempfile.TemporaryDirectory() as folder:
        subject.server(Path(folder), secured=True)
        return (Path(folder) / "package" / WEIGHTS).read_bytes()


def torn(subject: Any) -> object:
    """What becomes of half a checkpoint: the step it resumes at, or how it is refused."""
    options = TrainOptions(steps=2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        session = subject.session("digits", options)
        session.step()
        subject.save_session(session, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        try:
            return subject.resume_session("digits", options, path).step_index
        except Exception as error:  # how it refuses is what is observed
            return type(error).__name__


def saved_again(subject: Any) -> object:
    """What is there of a checkpoint when another one cannot be saved over it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        session = subject.session("digits", TrainOptions(steps=2))
        subject.save_session(session, path)
        with file_size_limited(512):
            refused = False
            try:
                subject.save_session(session, path)
            except Exception:  # whatever it refuses with: that it does is what is observed
                refused = True
        return refused, path.exists() and path.stat().st_size > 0


_SEEDED = partial(Defect, stage=Stage.EXPORT, alive=observe.exported)


DEFECTS: tuple[Defect, ...] = (
    _SEEDED(
        id="P14_exported_scale_off_by_one_percent",
        title="The exported scales are one percent larger than those of the forward",
        check="integration.compat_v1_0",
        shows="own_export_misread is 6 modules",
        subject=partial(ExportsScales, lambda scale: scale * 1.01),
        subtlety=4,
    ),
    _SEEDED(
        id="P14_exported_scale_in_bf16",
        title="The exported scales are rounded to bfloat16, and the codes were made with fp32 ones",
        check="integration.compat_v1_0",
        shows="own_export_misread is 6 modules",
        subject=partial(ExportsScales, lambda scale: scale.bfloat16().float()),
        subtlety=5,
    ),
    _SEEDED(
        id="P09_exported_rows_reversed",
        title="The exported codes have their rows in reverse",
        check="integration.compat_v1_0",
        shows="own_export_misread is 6 modules",
        subject=SwappedRows,
    ),
    _SEEDED(
        id="E11_exported_embedding_rolled",
        title="The exported embedding is moved by one token, as by one special token more",
        check="integration.third_party_readers",
        shows="own_plain_tensors_differ is 1",
        subject=RolledEmbedding,
        alive=exported_untrained,
        subtlety=4,
    ),
    _SEEDED(
        id="E05_serves_another_package",
        title="The package that is served is not the trained model's",
        check="integration.served_equals_trained",
        shows="wrong answer (tokens)",
        subject=ServesAnotherPackage,
        alive=served_weights,
        subtlety=4,
        stage=Stage.SERVING,
    ),
    _SEEDED(
        id="E10_scores_half_the_data",
        title="The score of a package is that of half of the held-out data",
        check="transitions.phase5_to_phase6",
        shows="claimed_metrics is",
        subject=ScoresHalfTheData,
        subtlety=4,
    ),
    _SEEDED(
        id="E10_scores_the_model_before_export",
        title="The score of a package is the trained model's, and the package holds other weights",
        check="integration.compat_v1_0",
        shows="own_export_misread is",
        subject=ScoresTheTrainedModel,
        subtlety=5,
        source="pytorch/ao 6922733cb",
    ),
    _SEEDED(
        id="E10_believes_claims",
        title="The score that a package claims is taken for the one it has",
        check="transitions.rollback",
        shows="_broken_quality",
        subject=BelievesClaims,
        alive=scored,
        subtlety=4,
    ),
    _SEEDED(
        id="E07_hands_over_latents",
        title="What is handed over is the state dict of training, which says nothing of the model",
        check="transitions.phase4_to_phase5",
        shows="missing_fields is",
        subject=HandsOverLatents,
        alive=provided,
        subtlety=2,
        source="kyegomez/BitNet#52",
    ),
    _SEEDED(
        id="E08_digest_of_an_object",
        title="The digest of the data is that of an object's address: another in every export",
        check="transitions.repeat_is_idempotent",
        shows="same_bytes is False",
        subject=DigestsAnObject,
        alive=observe.data,
        subtlety=4,
        source="EleutherAI/lm-evaluation-harness#3331",
    ),
    _SEEDED(
        id="C12_starts_over_from_half_a_checkpoint",
        title="Half a checkpoint is taken as none, and training starts over",
        check="integration.scenario_recovery",
        shows="torn_accepted is True",
        subject=Restarts,
        alive=torn,
        source="PrimeIntellect-ai/prime-rl#1825",
        stage=Stage.CHECKPOINT,
    ),
    _SEEDED(
        id="C01_recovers_without_momentum",
        title="A run that recovers has lost the state of its optimizer",
        check="integration.scenario_recovery",
        shows="losses_equal is False",
        subject=ForgetsMomentum,
        alive=observe.resumed,
        source="huggingface/nanotron 013a153c",
        stage=Stage.CHECKPOINT,
    ),
    _SEEDED(
        id="C11_checkpoint_written_in_place",
        title="A checkpoint is written over the one before",
        check="integration.scenario_recovery",
        shows="checkpoint_kept is False",
        subject=SavesInPlace,
        alive=saved_again,
        subtlety=2,
        source="Lightning-AI/pytorch-lightning#20012",
        stage=Stage.CHECKPOINT,
    ),
)
"""Exports, scores, servers and checkpoints."""
