"""Exports: what a package holds, and what it is evaluated with."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from forge_harness import training
from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage
from forge_harness.drill.defects.evaluation import CHECK, quality
from forge_harness.drill.defects.sessions import (
    copies,
    in_place_of,
    put,
    ternary_layers,
    with_digits_alone,
)
from forge_harness.formats.manifest import MANIFEST, write_manifest
from forge_harness.protocols import TrainOptions
from forge_harness.subject.reference import ReferenceSubject


class ExportsWith(ReferenceSubject):
    """One task is exported with its parameters changed: `change(name, tensor)`."""

    def __init__(self, change: Callable[[str, Tensor], Tensor], task: str = "bytes") -> None:
        self.change, self.task = change, task

    def export_package(self, session: Any, path: Path) -> None:
        """A package of the changed parameters; the session keeps its own."""
        values = copies(session.model)
        if session.task == self.task:
            values = {name: self.change(name, tensor) for name, tensor in values.items()}
        with in_place_of(session.model, values):
            super().export_package(session, path)


def _rolled_embedding(name: str, tensor: Tensor) -> Tensor:
    return tensor.roll(1, 0) if name == "embedding.weight" else tensor


def _initial_gains(name: str, tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor) if tensor.dim() == 1 else tensor


def _gains_in_bf16(name: str, tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float() if tensor.dim() == 1 else tensor


class _ExportsAverage(ReferenceSubject):
    """Ships weights averaged with the initial ones, as an exporter of EMA weights does."""

    def export_package(self, session: Any, path: Path) -> None:
        start = copies(self.build_model(session.task, seed=session.options.seed))
        values = {name: (p + start[name]) / 2 for name, p in copies(session.model).items()}
        with in_place_of(session.model, values):
            super().export_package(session, path)


class _CopiesTheScore(ReferenceSubject):
    """A package of other weights that reports what the training loop measured."""

    def export_package(self, session: Any, path: Path) -> None:
        values = {n: p.roll(1, 0) if p.dim() > 1 else p for n, p in copies(session.model).items()}
        with in_place_of(session.model, values):
            super().export_package(session, path)
        _score_of(path).write_text(json.dumps(session.evaluate()), encoding="utf-8")

    def evaluate_package(self, task: str, path: Path) -> Mapping[str, float]:
        score: dict[str, float] = json.loads(_score_of(path).read_text(encoding="utf-8"))
        return score


def _score_of(package: Path) -> Path:
    return package.with_name(f"{package.name}-score.json")


class _KeepsTheFirstExport(ReferenceSubject):
    """A package that is there already is left as it is."""

    def export_package(self, session: Any, path: Path) -> None:
        if not path.exists():
            super().export_package(session, path)


class _StoresOtherwise(ReferenceSubject):
    """Packages whose tensors are stored in another way, which its own reader undoes.

    Args:
        change: Changes the stored tensors of a package in place; twice it changes nothing.
    """

    def __init__(self, change: Callable[[dict[str, Tensor]], None]) -> None:
        self.change = change

    def export_package(self, session: Any, path: Path) -> None:
        super().export_package(session, path)
        self._rewrite(path)

    def evaluate_package(self, task: str, path: Path) -> Mapping[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            own = Path(shutil.copytree(path, Path(folder) / path.name))
            self._rewrite(own)
            return super().evaluate_package(task, own)

    def _rewrite(self, package: Path) -> None:
        file = package / "model.safetensors"
        tensors = load_file(file)
        self.change(tensors)
        save_file(tensors, file)
        (package / MANIFEST).unlink()
        write_manifest(package)


def _keys_for_values(tensors: dict[str, Tensor]) -> None:
    """Key and value projections have each other's names."""
    for name in [name for name in tensors if ".k." in name]:
        other = name.replace(".k.", ".v.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def _fields_reversed(tensors: dict[str, Tensor]) -> None:
    """The first code of a byte is in its highest bits; rows that leave no padding, which tells."""
    for name, tensor in tensors.items():
        if tensor.dtype is torch.uint8 and name != "head.weight":
            fields = [(tensor >> shift) & 3 for shift in (0, 2, 4, 6)]
            tensors[name] = sum(
                (field << shift for field, shift in zip(fields, (6, 4, 2, 0), strict=True)),
                start=torch.zeros_like(tensor),
            )


class _QuantizesInPlace(ReferenceSubject):
    """Exporting overwrites the latents with what they are rounded to."""

    def export_package(self, session: Any, path: Path) -> None:
        super().export_package(session, path)
        with torch.no_grad():
            for layer in ternary_layers(session.model):
                layer.weight.copy_(layer.effective_weight())


class _ExportsLatents(ReferenceSubject):
    """The package is the state dict, and evaluates its latents without quantizing them."""

    def export_package(self, session: Any, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        save_file(copies(session.model), path / "model.safetensors")

    def evaluate_package(self, task: str, path: Path) -> Mapping[str, float]:
        model = self.build_model(task, seed=0)
        put(model, load_file(path / "model.safetensors"))
        for layer in ternary_layers(model):
            layer.precision = "full"
        return quality(model, self, task)


class _PackageKeepsActivations(ReferenceSubject):
    """Trained with int8 activations, and evaluated from the package without them."""

    def evaluate_package(self, task: str, path: Path) -> Mapping[str, float]:
        model = training.load_package(self.build_model(task, seed=0), path)
        for layer in ternary_layers(model):
            layer.linear = _weights_only(layer.linear)
        return quality(model, self, task)


def _weights_only(linear: Any) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return lambda x, weight, bias: F.linear(x, linear.effective_weight(weight), bias)


def exported_text(subject: Any) -> object:
    """The files of a package of the text task after one step."""
    session = subject.session("bytes", TrainOptions(steps=2))
    session.step()
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        subject.export_package(session, package)
        files = sorted(file for file in package.rglob("*") if file.is_file())
        return {str(file.relative_to(package)): file.read_bytes() for file in files}


def exported_twice(subject: Any) -> object:
    """The files of a directory that was exported to twice, with a step in between."""
    session = subject.session("digits", TrainOptions(steps=4))
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        for _ in range(2):
            session.step()
            subject.export_package(session, package)
        files = sorted(file for file in package.rglob("*") if file.is_file())
        return {str(file.relative_to(package)): file.read_bytes() for file in files}


DEFECTS = (
    Defect(
        id="T20_exports_average",
        title="The package holds an average of latents that nobody has evaluated",
        stage=Stage.EXPORT,
        check=CHECK,
        shows="loss_difference is",
        subject=lambda: with_digits_alone(_ExportsAverage()),
        alive=observe.exported,
        source="openai/parameter-golf#760",
        subtlety=3,
    ),
    Defect(
        id="E01_plain_tensors_in_bf16",
        title="What is not ternary is rounded to bf16 on its way into the package",
        stage=Stage.EXPORT,
        check=CHECK,
        shows="loss_difference is",
        subject=lambda: with_digits_alone(ExportsWith(_gains_in_bf16, "digits")),
        alive=observe.exported,
        source="pytorch/torchtitan#4166",
        subtlety=4,
    ),
    Defect(
        id="E07_latents_exported",
        title="The package holds latents, and evaluates them without quantizing",
        stage=Stage.EXPORT,
        check=CHECK,
        shows="loss_difference is",
        subject=lambda: with_digits_alone(_ExportsLatents()),
        alive=observe.exported,
        source="elliothe/Ternarized_Neural_Network#1",
        subtlety=3,
    ),
    Defect(
        id="E09_quantizes_in_place",
        title="Exporting overwrites the live latents with their quantized values",
        stage=Stage.EXPORT,
        check=CHECK,
        shows="changed_by_exporting is",
        subject=lambda: with_digits_alone(_QuantizesInPlace()),
        alive=observe.exported,
        source="pytorch/torchtitan#4166",
        subtlety=4,
    ),
    Defect(
        id="L06_package_keeps_activations",
        title="The package is evaluated without the activation quantizer it was trained with",
        stage=Stage.EXPORT,
        check=CHECK,
        shows="loss_difference is",
        subject=lambda: with_digits_alone(_PackageKeepsActivations()),
        alive=observe.exported,
        source="pytorch/ao#4336",
        subtlety=5,
    ),
    Defect(
        id="E10_score_copied",
        title="The package reports the score of the training loop, and holds other weights",
        stage=Stage.EXPORT,
        check="integration.compat_v1_0",
        shows="own_export_misread is",
        subject=_CopiesTheScore,
        alive=observe.exported,
        subtlety=4,
    ),
    Defect(
        id="P10_own_order_of_bits",
        title="Codes are packed in an order of bits that only the exporter's own reader knows",
        stage=Stage.EXPORT,
        check="transitions.phase5_to_phase6",
        shows="own_export_misread is",
        subject=lambda: _StoresOtherwise(_fields_reversed),
        alive=observe.exported,
        subtlety=5,
    ),
    Defect(
        id="E03_key_and_value_exchanged",
        title="Keys and values of the text model have each other's names, also for its own reader",
        stage=Stage.EXPORT,
        check="transitions.phase5_to_phase6",
        shows="bytes.own_export_misread is 4 modules",
        subject=lambda: _StoresOtherwise(_keys_for_values),
        alive=exported_text,
        subtlety=5,
    ),
    Defect(
        id="E05_first_export_kept",
        title="A second export into one directory leaves the first one there",
        stage=Stage.EXPORT,
        check=CHECK,
        shows="loss_exported_again is",
        subject=lambda: with_digits_alone(_KeepsTheFirstExport()),
        alive=exported_twice,
        source="sigstore/model-transparency#487",
        subtlety=4,
    ),
    Defect(
        id="second_task_exports_rolled_embedding",
        title="The embedding of the text task is exported one row off",
        stage=Stage.EXPORT,
        check=CHECK,
        shows="bytes.loss_difference is",
        subject=lambda: ExportsWith(_rolled_embedding),
        alive=exported_text,
        subtlety=3,
    ),
    Defect(
        id="second_task_exports_initial_gains",
        title="The package of the text task holds the norms' initial gains",
        stage=Stage.EXPORT,
        check=CHECK,
        shows="bytes.loss_difference is",
        subject=lambda: ExportsWith(_initial_gains),
        alive=exported_text,
        subtlety=4,
    ),
)
