"""Inference packages: the trained model in the native format (docs/formats.md), and back.

The scale is the one the training forward used. Derived anew from stored weights it would differ in
the last bits, and codes at the rounding threshold would flip with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from forge_harness.durable import staged_directory
from forge_harness.errors import CheckpointError, DamagedCheckpointError, NonTernaryCodeError
from forge_harness.formats import (
    Checkpoint,
    ModelDescription,
    ReadOptions,
    TensorInfo,
    TernaryTensor,
    WriteOptions,
    native,
    native_v09,
)
from forge_harness.formats.detect import detect
from forge_harness.formats.manifest import MANIFEST, read_manifest
from forge_harness.formats.native_common import check_tensors
from forge_harness.formats.safetensors_file import NAMES
from forge_harness.model import BitLinear
from forge_harness.model.families import OWN_FAMILIES, configuration_of, own_model
from forge_harness.model.from_checkpoint import StoredCodes
from forge_harness.paths import resolved_path
from forge_harness.quant import EPS, Compute, TernaryLinearOp
from forge_harness.training.data import DataSource
from forge_harness.training.evaluation import Evaluation, evaluate_model
from forge_harness.training.ingredients import BuildModel, ingredients
from forge_harness.training.randomness import RandomState
from forge_harness.training.session import QATSession


class PackageError(CheckpointError):
    """A package is missing, damaged or of another model, or a model cannot be packaged."""


def export_package(session: QATSession, path: Path, model: nn.Module | None = None) -> None:
    """Writes the model of a session as inference weights (see `ExportsWeights.export_package`).

    The directory is a native package, durable when the call returns; a package that was there is
    replaced whole. The model is only read.

    Args:
        session: Whose model it is.
        path: The directory.
        model: The session's `whole_model`, where its own is sharded; None: its own.

    Raises:
        PackageError: The model has no ternary layer, or one whose values are not codes times a
            positive scale a part; or `path` holds something that is no package.
        OSError: The file system refused; a package that was there is untouched.
    """
    path = resolved_path(Path(path))  # A link keeps its place; what it names is replaced.
    with _as_package_error():
        source = _live_model(session, session.model if model is None else model)
        _refuse_other_content(path)
        with staged_directory(path, replace=True) as stage:
            native.write_native(source, stage, WriteOptions())


def evaluate_package(
    task: str,
    path: Path,
    *,
    build_model: BuildModel | None = None,
    load: DataSource | None = None,
) -> dict[str, float]:
    """Returns `loss` and `accuracy` of a package (see `ExportsWeights.evaluate_package`).

    Raises:
        PackageError: The package is missing, damaged or of another model.
    """
    result = evaluate_packaged(task, path, build_model=build_model, load=load)
    return {"loss": result.loss, "accuracy": result.accuracy}


def evaluate_packaged(
    task: str,
    path: Path,
    *,
    build_model: BuildModel | None = None,
    load: DataSource | None = None,
) -> Evaluation:
    """Returns the evaluation of a package on the validation split, sample by sample."""
    parts = ingredients(build_model, load)
    model = load_package(parts.build_model(task, 0, "ternary"), Path(path))
    return evaluate_model(model, parts.data, task)


def load_package(model: nn.Module, path: Path) -> nn.Module:
    """Puts a package into a model of the same architecture, in evaluation mode.

    Its ternary layers answer with the stored codes from then on; training it is not meant.

    Raises:
        PackageError: The package is missing, damaged or of another model.
    """
    with open_package(path) as package, _as_package_error():
        return _filled(model, package)


def package_model(path: Path) -> nn.Module:
    """Builds the model of a package from its files alone, in evaluation mode.

    Raises:
        PackageError: The package is missing or damaged, or its family or configuration is none
            that can be built.
    """
    with open_package(path) as package, _as_package_error():
        return _filled(_built(package), package)


@contextmanager
def open_package(path: Path) -> Iterator[native.NativeCheckpoint]:
    """Opens a package after comparing every file with its manifest.

    Raises:
        PackageError: The package is missing or damaged, or of another format or version.
    """
    path = Path(path)
    with _as_package_error():
        found = detect(path).format
        if found != "native":
            raise PackageError(
                f"{str(path)!r} is {found}, and a package is native: convert it or export it again."
            )
        package = native.open_native(path, ReadOptions())
    with package:
        yield package


@dataclass
class _LiveModel(Checkpoint):
    """The model of a session as a source to be written; nothing of it is copied or changed."""

    layers: Mapping[str, BitLinear] = field(kw_only=True)
    tensors: Mapping[str, Tensor] = field(kw_only=True)

    def ternary(self, name: str) -> TernaryTensor:
        layer, module = self.layers[name], name.removesuffix(".weight")
        pairs = _quantized(module, layer)
        scales = torch.stack([scale.detach().reshape(()).float() for _, scale in pairs]).cpu()
        if not bool(((scales > 0) & scales.isfinite()).all()):
            raise PackageError(
                f"Layer {module!r} has scales {scales.tolist()}; a package "
                "holds positive finite ones."
            )
        codes = torch.cat([codes for codes, _ in pairs]).cpu()
        try:
            return TernaryTensor.from_codes(codes, scales, _parts(layer))
        except NonTernaryCodeError as error:
            raise PackageError(f"Layer {module!r}: {error}") from error

    def plain(self, name: str) -> Tensor:
        return self.tensors[name].detach().cpu()

    def close(self) -> None:
        pass


def _live_model(session: QATSession, model: nn.Module) -> _LiveModel:
    layers = _ternary_layers(model)
    if not layers:
        raise PackageError(
            f"The model of {session.task!r} has no ternary layer to package (precision "
            f"{session.options.precision!r}); train it with precision 'ternary'."
        )
    weights = {f"{name}.weight": layer for name, layer in layers.items()}
    tensors, tied = _untied(model, weights)
    infos = {name: _info(name, tensor, weights.get(name)) for name, tensor in tensors.items()}
    return _LiveModel(
        format="native",
        path=Path(f"the model of {session.task!r}"),
        model=_description(model, infos, tied),
        infos=infos,
        tied=tied,
        quantization={"compute": _compute(layers)},
        extras={
            "task": session.task,
            "step": session.step_index,
            "seed": session.options.seed,
        },
        layers=weights,
        tensors=tensors,
    )


def _untied(
    model: nn.Module, weights: Mapping[str, BitLinear]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the state with shared tensors once, and alias -> name of the others.

    A ternary weight is no alias, even where it shares its latent with another: codes and scales
    are what its own arithmetic makes of it.
    """
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if key not in weights and id(value) in first:
            tied[key] = first[id(value)]
            continue
        if key not in weights:
            first[id(value)] = key
        stored[key] = cast(Tensor, value)
    return stored, tied


def _info(name: str, tensor: Tensor, layer: BitLinear | None) -> TensorInfo:
    shape = tuple(tensor.shape)
    if layer is not None:
        parts = _parts(layer)
        nbytes = -(-shape[0] // 4) * shape[1] + 4 * len(parts)
        return TensorInfo(name, "ternary", shape, native.PACKING, nbytes, parts, master=True)
    if tensor.dtype not in NAMES:
        raise PackageError(f"Tensor {name!r} has dtype {tensor.dtype}, which no package holds.")
    return TensorInfo(name, "plain", shape, NAMES[tensor.dtype], tensor.nbytes)


def _description(
    model: nn.Module, infos: Mapping[str, TensorInfo], tied: Mapping[str, str]
) -> ModelDescription:
    """Names the model only when its configuration says all there is to say about it."""
    found = configuration_of(model)
    if found is not None:
        described = ModelDescription(*found)
        shapes = {name: info.shape for name, info in infos.items()}
        if check_tensors(described, shapes, tied) is None:
            return described
    return ModelDescription("unknown", {})


def _refuse_other_content(path: Path) -> None:
    """What is replaced whole must be a package and nothing more."""
    if not path.exists() and not path.is_symlink():
        return
    own = {native.CONFIG, native.WEIGHTS, MANIFEST}
    if native_v09.recognise(path):
        own |= {native_v09.CONFIG, native_v09.WEIGHTS}
    with suppress(DamagedCheckpointError):
        own |= {entry.path for entry in read_manifest(path).files}
    files = (
        [path]
        if not path.is_dir()
        else [p for p in path.rglob("*") if p.is_symlink() or not p.is_dir()]
    )
    for file in files:
        if file.relative_to(path).as_posix() not in own:
            raise PackageError(
                f"{str(path)!r} holds {file.name!r}, which is no part of a package; choose another "
                "directory, or remove it."
            )


def _filled(model: nn.Module, package: native.NativeCheckpoint) -> nn.Module:
    layers = {f"{name}.weight": layer for name, layer in _ternary_layers(model).items()}
    stored = package.ternary_names()
    if set(layers) != set(stored):
        raise PackageError(
            f"Package {package.path.name} quantizes {sorted(stored)}, the model {sorted(layers)}; "
            "evaluate it with the model it was exported from."
        )
    state = {name: package.plain(name) for name in package.plain_names()}
    compute = cast(Compute, package.quantization["compute"])
    for name, layer in layers.items():
        ternary = package.ternary(name)
        if ternary.parts != _parts(layer):
            raise PackageError(
                f"Package {package.path.name} has scales for parts of {ternary.parts} rows in "
                f"{name!r}, the model {_parts(layer)}; evaluate it with the model it was exported "
                "from."
            )
        quantizer = StoredCodes.of(ternary)
        layer.linear = TernaryLinearOp(quantize_weight=quantizer, compute=compute)
        state[name] = quantizer.values()
    state |= {alias: state[name] for alias, name in package.tied.items()}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise PackageError(
            f"Package {package.path.name} does not fit the model: {reason}"
        ) from error
    return model.eval()


def _built(package: native.NativeCheckpoint) -> nn.Module:
    family = package.model.family
    if family not in OWN_FAMILIES:
        raise PackageError(
            f"Package {package.path.name} is of model family {family!r}; only "
            f"{' and '.join(OWN_FAMILIES)} can be built. Load it into its own model with "
            "load_package."
        )
    with RandomState(0).active():
        model: nn.Module = own_model(family, package.model.config)
    return model


def _ternary_layers(model: nn.Module) -> dict[str, BitLinear]:
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BitLinear) and module.precision == "ternary"
    }


def _parts(layer: BitLinear) -> tuple[int, ...]:
    return layer.parts or (layer.out_features,)


def _compute(layers: Mapping[str, BitLinear]) -> Compute:
    # `int8` and `exact` give the same bits; `exact` runs anywhere.
    modes = {getattr(layer.linear, "compute", "exact") for layer in layers.values()}
    return "fake" if modes == {"fake"} else "exact"


@torch.no_grad()
def _quantized(name: str, layer: BitLinear) -> list[tuple[Tensor, Tensor]]:
    """Returns codes and scale of each part, as the training forward has them."""
    parts = list(_parts(layer))
    if isinstance(layer.linear, TernaryLinearOp):
        weights = torch.split(layer.weight.detach(), parts)
        pairs = [layer.linear.quantize_weight(weight) for weight in weights]
    else:
        effective = torch.split(layer.effective_weight(), parts)
        pairs = [_factored(name, values) for values in effective]
    if any(scale.numel() != 1 for _, scale in pairs):
        raise PackageError(f"Layer {name!r} has one scale a row; a package holds one a part.")
    return pairs


def _factored(name: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """Splits the effective weight of a foreign arithmetic into codes and scale."""
    scale = values.abs().max().float()
    if not scale:  # Any scale fits; this is the one the quantizers here give a zero weight.
        return torch.zeros(values.shape, dtype=torch.int8), torch.tensor(EPS)
    codes = torch.round(values / scale)
    if not torch.equal(codes * scale, values.float()):
        raise PackageError(
            f"The effective weight of layer {name!r} is not ternary codes times one "
            " scale; it cannot be packaged."
        )
    return codes.to(torch.int8), scale


@contextmanager
def _as_package_error() -> Iterator[None]:
    try:
        yield
    except PackageError:
        raise
    except CheckpointError as error:
        wrapped = PackageError(str(error))
        wrapped.exit_code = error.exit_code
        raise wrapped from error
