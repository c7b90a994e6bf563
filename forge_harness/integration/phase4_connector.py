"""`Phase4Connector` takes over what phase 4 left: detect, load, convert, start training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forge_harness.canonical import tree_digest
from forge_harness.errors import DamagedCheckpointError
from forge_harness.formats import Detection, ModelDescription, ReadOptions, WriteOptions
from forge_harness.formats.convert import ConversionReport, convert
from forge_harness.formats.detect import detect, open_checkpoint
from forge_harness.formats.digests import codes_sha256
from forge_harness.protocols import TrainOptions
from forge_harness.training import QATSession, evaluate_package
from forge_harness.training.start import TASK_OF, misfit, read_start, require_fit

from .compatibility import (
    CompatibilityCase,
    CompatibilityRow,
    Evaluate,
    measure,
    reference_cases,
)
from .metrics_sync import Measurements, MetricRow, MetricTarget, read_targets, sync_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedWeight:
    """A ternary tensor as it was read: shape, scales and the SHA-256 of its codes."""

    shape: tuple[int, int]
    scales: tuple[float, ...]
    codes_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """A checkpoint that was read whole.

    Attributes:
        path: File or directory.
        detection: What it is, and why.
        model: What the files say about the model.
        quantization: Facts about codes and scales.
        ternary: Weight name -> what was read.
        plain: Names of the other tensors.
        targets: What its makers promised.
        digest: `sha256:<hex>` over its files, the same before and after.
    """

    path: Path
    detection: Detection
    model: ModelDescription
    quantization: Mapping[str, Any]
    ternary: Mapping[str, LoadedWeight]
    plain: tuple[str, ...]
    targets: Mapping[str, MetricTarget]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QATConfiguration:
    """How training goes on from a checkpoint.

    Attributes:
        family: Of the model.
        task: Reference task it is trained on; None where there is none, or where the sizes of the
            model are not those of its data.
        ternary: Weights that stay ternary.
        excluded: Matrices in full precision.
        granularity: "tensor" or "part": what shares a scale.
        latents: "stored" masters, or "made" from codes and scales so that they quantize to them.
        targets: What its makers promised.
    """

    family: str
    task: str | None
    ternary: tuple[str, ...]
    excluded: tuple[str, ...]
    granularity: Literal["tensor", "part"]
    latents: Literal["stored", "made"]
    targets: Mapping[str, MetricTarget]


class Phase4Connector:
    """Connects phase 4 (BitNet compression) with phase 5 (training).

    Args:
        read: What the files cannot say.
        evaluate: Held-out metrics of (task, package); None: the reference data.
    """

    def __init__(
        self, *, read: ReadOptions | None = None, evaluate: Evaluate | None = None
    ) -> None:
        self.read = read or ReadOptions()
        self._evaluate = evaluate or evaluate_package

    def detect(self, path: Path) -> Detection:
        """Says what a checkpoint is; see `forge_harness.formats.detect.detect`."""
        return detect(path)

    def load(self, path: Path) -> LoadedCheckpoint:
        """Reads every tensor and changes nothing.

        Raises:
            CheckpointError: It cannot be read, or something must be told.
            DamagedCheckpointError: It does not hold what it claims to, or changed while read.
        """
        before = tree_digest(path)
        with open_checkpoint(path, self.read) as opened:
            ternary = {}
            for name in opened.ternary_names():
                tensor = opened.ternary(name)
                ternary[name] = LoadedWeight(
                    shape=tensor.shape,
                    scales=tuple(tensor.scales.tolist()),
                    codes_sha256=codes_sha256(tensor),
                )
            for name in opened.plain_names():
                opened.plain(name)
            model, facts, extras = opened.model, opened.quantization, opened.extras
            plain = tuple(opened.plain_names())
        if tree_digest(path) != before:
            raise DamagedCheckpointError(
                f"{path} changed while it was read; stop what writes to it, and load it again.",
                path=str(path),
            )
        return LoadedCheckpoint(
            path=path,
            detection=detect(path),
            model=model,
            quantization=facts,
            ternary=ternary,
            plain=plain,
            targets=read_targets(extras),
            digest=before,
        )

    def convert(self, path: Path, destination: Path, to: str = "native") -> ConversionReport:
        """Writes the checkpoint in another format; see `forge_harness.formats.convert.convert`."""
        return convert(path, destination, to, read=self.read, write=WriteOptions())

    def configure_qat(self, path: Path) -> QATConfiguration:
        """Says how training goes on from a checkpoint.

        Raises:
            CheckpointError: It cannot be read, or its targets are not well-formed.
        """
        with open_checkpoint(path, self.read) as opened:
            infos = opened.infos.values()
            coded = [info for info in infos if info.kind == "ternary"]
            return QATConfiguration(
                family=opened.model.family,
                task=None if misfit(opened.model) else TASK_OF.get(opened.model.family),
                ternary=tuple(info.name for info in coded),
                excluded=tuple(i.name for i in infos if i.kind == "plain" and len(i.shape) > 1),
                granularity="part" if any(len(info.parts) > 1 for info in coded) else "tensor",
                latents="stored" if all(info.master for info in coded) else "made",
                targets=read_targets(opened.extras),
            )

    def start_session(self, path: Path, options: TrainOptions) -> QATSession:
        """Starts training whose first forward multiplies by the checkpoint's codes and scales.

        Raises:
            CheckpointError: It cannot be read, its family has no reference task or its sizes are
                not those of the task's data, or no latent weight quantizes to what it stores.
        """
        start = read_start(path, self.read)
        require_fit(path.name, start.model)
        return QATSession(
            TASK_OF[start.model.family],
            options,
            build_model=start.build_model,
            initial_weights=start.weights,
        )

    def sync_metrics(
        self, targets: Mapping[str, MetricTarget], measured: Measurements
    ) -> tuple[MetricRow, ...]:
        """Compares measurements with targets by name and unit."""
        return sync_metrics(targets, measured)

    def compatibility(
        self, cases: Sequence[CompatibilityCase] | None = None
    ) -> tuple[CompatibilityRow, ...]:
        """Measures the compatibility matrix; None: the specification's rows, on frozen models."""
        chosen = reference_cases() if cases is None else cases
        return tuple(measure(case, evaluate=self._evaluate, read=self.read) for case in chosen)
