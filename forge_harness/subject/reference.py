"""The reference subject: the BitNet b1.58 pipeline of this repository behind the protocols.

Every method may be overridden, and the models follow: a subclass that changes
`quantize_weight`, `quantize_activation` or `linear` changes what its models compute, and one
that changes `build_model`, `loss`, `batch` or `epoch_order` changes what its sessions train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from torch import Tensor, nn

from forge_harness import config, kernels, quant, training
from forge_harness.formats.detect import open_checkpoint
from forge_harness.model import BitLinear, ByteLM, DigitsModel
from forge_harness.model.bitlinear import LinearFunction
from forge_harness.model.packed_model import pack_model
from forge_harness.paths import fixtures_dir
from forge_harness.protocols import (
    Arm,
    AuditWriter,
    Batch,
    ContentSealer,
    DataInfo,
    ModelSpec,
    Precision,
    QualityRun,
    QuantizationInfo,
    ResolvedConfig,
    ScheduleSpec,
    ScheduleStep,
    ServerSpec,
    StoreSpec,
    TrainingSession,
    TrainOptions,
)
from forge_harness.security import audit, signing
from forge_harness.security.keys import Keyring, Purpose
from forge_harness.security.sealing import KeyringSealer
from forge_harness.subject.serving import byte_model_server
from forge_harness.subject.study import study_run

Split = Literal["train", "validation"]
TASKS = ("digits", "bytes")
MAX_PARAMETERS = {"digits": 100_000, "bytes": 2_000_000}
"""Budgets: the specification's gate for the language model, a tenth of a megabyte for digits."""

HANDED_OVER_STEPS = 30
"""Training steps of the checkpoint the reference subject hands over: codes no longer random."""


class ReferenceSubject:
    """Offers every capability of `forge_harness.protocols`."""

    name = "reference"
    _keyring: Keyring | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # A report that calls somebody else's model the reference misleads who reads its title.
        if cls.name == ReferenceSubject.name:
            cls.name = cls.__name__

    def __deepcopy__(self, memo: dict[int, object]) -> ReferenceSubject:
        # Models may hold bound methods of the subject; copying a model must not copy it.
        return self

    # Quantizes, QuantizesParts, Packs

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Quantizes.quantize_weight`."""
        return quant.absmean_ternary(weight)

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Quantizes.quantize_activation`."""
        return quant.absmax_int8(x)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Quantizes.linear`."""
        return self._op()(x, weight, bias)

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Quantizes.integer_linear`."""
        return quant.integer_linear(x, weight)

    def quantize_weight_parts(self, weight: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `QuantizesParts.quantize_weight_parts`."""
        return quant.absmean_ternary_parts(weight, parts)

    def pack(self, codes: Tensor) -> Tensor:
        """See `Packs.pack`."""
        return quant.pack_i2(codes)

    def unpack(self, packed: Tensor, rows: int) -> Tensor:
        """See `Packs.unpack`."""
        return quant.unpack_i2(packed, rows)

    # BuildsModel

    def tasks(self) -> Sequence[str]:
        """See `BuildsModel.tasks`."""
        return TASKS

    def model_spec(self, task: str) -> ModelSpec:
        """See `BuildsModel.model_spec`. Read off a model of the library, not off `build_model`."""
        model = _declared_model(task)
        return ModelSpec(
            task=task,
            parameters=model.parameter_formula(),
            max_parameters=MAX_PARAMETERS[task],
            quantized=model.quantized_names(),
            full_precision=model.full_precision_names(),
            sub_norms=model.sub_norm_names(),
            causal=isinstance(model, ByteLM),
            tied=model.tied(),
        )

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """See `BuildsModel.build_model`."""
        return training.reference_model(task, seed, "ternary", linear=self._linear())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `BuildsModel.loss`."""
        return training.training_loss(model, batch)

    def example_batch(self, task: str, *, batch_size: int, seed: int) -> Batch:
        """See `BuildsModel.example_batch`: pixels in [0, 1], or 32 random bytes a row."""
        generator = torch.Generator().manual_seed(seed)
        if task == "digits":
            return Batch(
                inputs=torch.rand(batch_size, 64, generator=generator),
                targets=torch.randint(10, (batch_size,), generator=generator),
            )
        text = torch.randint(256, (batch_size, 33), generator=generator)
        return Batch(inputs=text[:, :-1].contiguous(), targets=text[:, 1:].contiguous())

    def effective_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """See `BuildsModel.effective_weights`."""
        return {name: layer.effective_weight() for name, layer in _ternary_layers(model)}

    def latent_weights(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        """See `BuildsModel.latent_weights`."""
        return {name: layer.weight for name, layer in _ternary_layers(model)}

    # LoadsData

    def data_info(self, task: str) -> DataInfo:
        """See `LoadsData.data_info`."""
        return training.data_info(task)

    def data_digest(self, task: str) -> str:
        """See `LoadsData.data_digest`."""
        return training.data_digest(task)

    def documents(self, task: str, split: Split) -> Sequence[bytes]:
        """See `LoadsData.documents`."""
        return training.documents(task, split)

    def sample_contents(self, task: str, split: Split, ids: Sequence[int]) -> Sequence[bytes]:
        """See `LoadsData.sample_contents`."""
        return training.sample_contents(task, split, ids)

    def labels(self, task: str, split: Split) -> Sequence[int]:
        """See `LoadsData.labels`."""
        return training.labels(task, split)

    def batch(self, task: str, split: Split, ids: Sequence[int]) -> Batch:
        """See `LoadsData.batch`."""
        return training.batch(task, split, ids)

    def epoch_order(
        self, task: str, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
    ) -> Sequence[int]:
        """See `LoadsData.epoch_order`."""
        return training.epoch_order(task, seed=seed, epoch=epoch, rank=rank, world_size=world_size)

    # Trains, Checkpoints, ExportsWeights, TrainsDistributed

    def session(self, task: str, options: TrainOptions) -> TrainingSession:
        """See `Trains.session`."""
        return training.QATSession(task, options, **self._parts())

    def schedule_spec(self, task: str, options: TrainOptions) -> ScheduleSpec:
        """See `Trains.schedule_spec`."""
        return training.schedule_spec(task, options)

    def planned_schedule(self, task: str, options: TrainOptions) -> Sequence[ScheduleStep]:
        """See `Trains.planned_schedule`."""
        return training.planned_schedule(task, options)

    def save_session(self, session: TrainingSession, path: Path) -> None:
        """See `Checkpoints.save_session`."""
        training.save_session(cast("training.QATSession", session), path)

    def resume_session(self, task: str, options: TrainOptions, path: Path) -> TrainingSession:
        """See `Checkpoints.resume_session`."""
        return training.resume_session(task, options, path, **self._parts())

    def export_package(self, session: TrainingSession, path: Path) -> None:
        """See `ExportsWeights.export_package`."""
        training.export_package(cast("training.QATSession", session), path)

    def evaluate_package(self, task: str, path: Path) -> Mapping[str, float]:
        """See `ExportsWeights.evaluate_package`."""
        return training.evaluate_package(task, path)

    def provide_checkpoint(self, directory: Path) -> Path:
        """See `HoldsCheckpoint.provide_checkpoint`: the digits model after a few steps."""
        session = self.session("digits", TrainOptions(steps=HANDED_OVER_STEPS))
        for _ in range(HANDED_OVER_STEPS):
            session.step()
        self.export_package(session, directory / "digits")
        return directory / "digits"

    def train_distributed(
        self, task: str, options: TrainOptions, *, ranks: int
    ) -> Mapping[str, Tensor]:
        """See `TrainsDistributed.train_distributed`."""
        return training.train_distributed(task, options, ranks=ranks, **self._parts())

    # MeasuresQuality

    def quality_plan(self, profile: str) -> Sequence[tuple[str, Arm, int]]:
        """See `MeasuresQuality.quality_plan`."""
        return training.quality_plan(profile)

    def quality_run(self, task: str, arm: Arm, seed: int, profile: str) -> Sequence[QualityRun]:
        """See `MeasuresQuality.quality_run`."""
        return study_run(
            task, arm, seed, profile, **self._parts(own_loss=False), export=self.export_package
        )

    # KeepsState

    def state_store(self) -> StoreSpec:
        """See `KeepsState.state_store`."""
        return StoreSpec(
            opener="forge_harness.state:Store.open", old_stores=fixtures_dir() / "state"
        )

    # Configures

    def load_config(
        self,
        *,
        file: Path | None = None,
        environ: Mapping[str, str] | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> ResolvedConfig:
        """See `Configures.load_config`."""
        return config.load_config(file=file, environ=environ, flags=flags)

    def config_schema(self) -> Mapping[str, Any]:
        """See `Configures.config_schema`."""
        return config.config_json_schema()

    def quantization_info(self, task: str) -> QuantizationInfo:
        """See `Configures.quantization_info`."""
        return QuantizationInfo(
            scale_convention="multiply",
            packing="i2-rowblock",
            granularity="tensor",
            excluded=_declared_model(task).full_precision_names(),
        )

    # InfersPacked, MultipliesTernary

    def inference_model(
        self, task: str, form: Literal["packed", "full"], *, seed: int
    ) -> nn.Module:
        """See `InfersPacked.inference_model`."""
        if form == "full":
            return training.reference_model(task, seed, "full").eval()
        return pack_model(self.build_model(task, seed=seed)).eval()

    def products(self) -> Sequence[str]:
        """See `MultipliesTernary.products`: the instruction sets of the native kernels."""
        if kernels.native_problem():
            return ("reference",)
        first = kernels.cpu_path()
        return (first, *(path for path in kernels.cpu_paths() if path != first), "reference")

    def prepare_product(self, name: str, codes: Tensor) -> Callable[[Tensor], Tensor]:
        """See `MultipliesTernary.prepare_product`."""
        packed = kernels.pack(codes, scale=1.0)
        backend: kernels.Backend = "reference" if name == "reference" else "native"
        path = None if name == "reference" else name
        return lambda q: kernels.ternary_matmul(q, packed, backend=backend, path=path)

    # How overrides reach the models and sessions

    # SealsContent

    def content_sealer(self) -> ContentSealer:
        """See `SealsContent.content_sealer`."""
        return KeyringSealer(self._keys)

    def rotate_seal_key(self) -> None:
        """See `SealsContent.rotate_seal_key`."""
        self._keyring = self._keys().rotated()

    def destroy_old_seal_keys(self) -> None:
        """See `SealsContent.destroy_old_seal_keys`."""
        keyring = self._keys()
        for key_id in keyring.usable_ids():
            if key_id != keyring.active_id():
                keyring = keyring.destroyed(key_id)
        self._keyring = keyring

    # ReadsCheckpoints

    def read_checkpoint(self, path: Path) -> None:
        """See `ReadsCheckpoints.read_checkpoint`."""
        with open_checkpoint(path) as opened:
            for name in opened.ternary_names():
                opened.ternary(name)
            for name in opened.plain_names():
                opened.plain(name)

    # KeepsAuditLog, SignsPackages

    def audit_log(self, path: Path) -> AuditWriter:
        """See `KeepsAuditLog.audit_log`."""
        return AuditedActions(self._audit(path))

    def audit_problems(self, path: Path) -> Sequence[str]:
        """See `KeepsAuditLog.audit_problems`."""
        return audit.verify(
            path, keys=self._keys().usable_keys(Purpose.AUDIT), public_keys=[self._public_key()]
        ).problems

    def audited(self, path: Path, action: Callable[[], None]) -> None:
        """See `KeepsAuditLog.audited`."""
        with self._audit(path) as log:
            log.record(
                audit.AuditEvent(
                    actor="subject",
                    action="action.start",
                    resource="action",
                    decision=audit.Decision.ALLOW,
                )
            )
            action()

    def sign_package(self, directory: Path) -> Path:
        """See `SignsPackages.sign_package`."""
        return signing.sign_package(directory, [self._keys().active(Purpose.SIGN)]).path

    def check_package(self, directory: Path, signature: Path) -> None:
        """See `SignsPackages.check_package`."""
        signing.verify_package(directory, [self._public_key()], signature=signature)

    # Serves

    def server(self, directory: Path, *, secured: bool = False) -> ServerSpec:
        """See `Serves.server`."""
        return byte_model_server(directory, secured=secured)

    def _audit(self, path: Path) -> audit.AuditLog:
        return audit.AuditLog.of_keyring(path, self._keys())

    def _public_key(self) -> Ed25519PublicKey:
        seed = self._keys().active(Purpose.SIGN)
        return Ed25519PrivateKey.from_private_bytes(seed).public_key()

    def _keys(self) -> Keyring:
        """The keyring of this subject: made when first asked for, kept nowhere."""
        if self._keyring is None:
            self._keyring = Keyring.new()
        return self._keyring

    def _op(self) -> quant.TernaryLinearOp:
        # The functions themselves where they are not overridden: packed layers and kernels know
        # those.
        own_weight = self._overrides("quantize_weight")
        own_activation = self._overrides("quantize_activation")
        return quant.TernaryLinearOp(
            quantize_weight=self.quantize_weight if own_weight else quant.absmean_ternary,
            quantize_activation=self.quantize_activation if own_activation else quant.absmax_int8,
        )

    def _linear(self) -> LinearFunction:
        # The op rather than the bound method wherever it computes the same: sessions switch its
        # arithmetic, and it knows its effective weight without probing.
        return self.linear if self._overrides("linear") else self._op()

    def _overrides(self, method: str) -> bool:
        own = vars(self).get(method) or getattr(type(self), method)
        return own is not getattr(ReferenceSubject, method)

    def _parts(self, *, own_loss: bool = True) -> dict[str, Any]:
        parts: dict[str, Any] = {"build_model": self._build, "load": self}
        if own_loss and self._overrides("loss"):
            parts["loss"] = self.loss
        return parts

    def _build(self, task: str, seed: int, precision: Precision) -> nn.Module:
        if precision == "ternary":
            return self.build_model(task, seed=seed)
        return training.reference_model(task, seed, precision)


class AuditedActions:
    """An audit log behind `AuditWriter`."""

    def __init__(self, log: audit.AuditLog) -> None:
        self._log = log

    def add(self, actor: str, action: str, resource: str) -> None:
        """See `AuditWriter.add`."""
        self._log.record(
            audit.AuditEvent(
                actor=actor, action=action, resource=resource, decision=audit.Decision.ALLOW
            )
        )

    def close(self) -> None:
        """See `AuditWriter.close`."""
        self._log.close()


@cache
def _declared_model(task: str) -> DigitsModel | ByteLM:
    """Made once: on the meta device each initialization goes through Python. Only to be read."""
    with torch.device("meta"):
        return DigitsModel() if task == "digits" else ByteLM()


def _ternary_layers(model: nn.Module) -> list[tuple[str, BitLinear]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BitLinear) and module.precision == "ternary"
    ]
