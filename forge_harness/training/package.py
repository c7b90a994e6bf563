"""Inference packages: ternary codes at two bits each, their scales, and the rest as it is.

The scale is the one the training forward used. Derived anew from stored weights it would differ in
the last bits, and codes at the rounding threshold would flip with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from forge_harness.canonical import canonical_json, sha256_hex
from forge_harness.durable import write_durably
from forge_harness.errors import UsageError
from forge_harness.model import BitLinear
from forge_harness.quant import Compute, TernaryLinearOp, dequantize, pack_i2, unpack_i2
from forge_harness.training.data import DataSource
from forge_harness.training.evaluation import Evaluation, evaluate_model
from forge_harness.training.ingredients import BuildModel, ingredients
from forge_harness.training.session import QATSession

FORMAT = "forge-package/1"
WEIGHTS = "weights.safetensors"
CONFIG = "config.json"
_CODES = ".codes_i2"
_SCALES = ".scales"


class PackageError(UsageError):
    """A package is missing, damaged or of another model, or a model cannot be packaged."""


@dataclass(frozen=True, slots=True)
class StoredTernary:
    """Quantizer that answers with stored codes and scales instead of deriving them.

    Attributes:
        codes: int8 (N, K).
        scales: fp32 (P,), one a part.
        parts: Row counts of the parts; they sum to N.
    """

    codes: Tensor
    scales: Tensor
    parts: tuple[int, ...]

    def __call__(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns codes and scale of the part `weight` is a view of."""
        start = weight.storage_offset() // max(1, self.codes.shape[1])
        part = [sum(self.parts[:index]) for index in range(len(self.parts))].index(start)
        return self.codes[start : start + self.parts[part]], self.scales[part]

    def values(self) -> Tensor:
        """Returns scale * codes, fp32 (N, K)."""
        column = torch.repeat_interleave(self.scales, torch.tensor(self.parts))[:, None]
        return dequantize(self.codes, column)


def export_package(session: QATSession, path: Path) -> None:
    """Writes the model of a session as inference weights (see `ExportsWeights.export_package`).

    The directory gets `weights.safetensors` and, last, `config.json` with shapes and digest. Both
    are durable when the call returns.

    Raises:
        PackageError: The model has no ternary layer, or one whose values are not codes times a
            scale a part.
    """
    layers = _ternary_layers(session.model)
    if not layers:
        raise PackageError(
            f"The model of {session.task!r} has no ternary layer to package (precision "
            f"{session.options.precision!r}); train it with precision 'ternary'."
        )
    stored = {name: _stored(name, layer) for name, layer in layers.items()}
    rest, tied = _rest(session.model, layers)
    weights = save({**_packed(stored), **rest})
    config = {
        "format": FORMAT,
        "task": session.task,
        "step": session.step_index,
        "packing": "i2-rowblock",
        "scale_convention": "multiply",
        "compute": _compute(layers),
        "quantized": {
            name: {"shape": list(ternary.codes.shape), "parts": list(ternary.parts)}
            for name, ternary in stored.items()
        },
        "tied": tied,
        "weights_sha256": sha256_hex(weights),
    }
    write_durably(Path(path) / WEIGHTS, weights)
    write_durably(Path(path) / CONFIG, canonical_json(config))


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
    config, tensors = read_package(path)
    layers = _ternary_layers(model)
    if set(layers) != set(config["quantized"]):
        raise PackageError(
            f"Package {path.name} quantizes {sorted(config['quantized'])}, the model "
            f"{sorted(layers)}; evaluate it with the model it was exported from."
        )
    state = {key: t for key, t in tensors.items() if not key.endswith((_CODES, _SCALES))}
    for name, layer in layers.items():
        ternary = _unpacked(name, config["quantized"][name], tensors)
        layer.linear = TernaryLinearOp(quantize_weight=ternary, compute=config["compute"])
        state[f"{name}.weight"] = ternary.values()
    for alias, name in config["tied"].items():
        state[alias] = state[name]
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise PackageError(f"Package {path.name} does not fit the model: {reason}") from error
    return model.eval()


def read_package(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns configuration and tensors of a package.

    Raises:
        PackageError: A file is missing, damaged or of another format.
    """
    try:
        config = json.loads((path / CONFIG).read_bytes())
        content = (path / WEIGHTS).read_bytes()
        if config["format"] != FORMAT:
            raise ValueError(f"format {config['format']!r}, {FORMAT!r} was expected")
        if sha256_hex(content) != config["weights_sha256"]:
            raise ValueError(f"{WEIGHTS} does not have the sha256 in {CONFIG}")
        return config, load(content)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise PackageError(
            f"{str(path)!r} is not a package, or it is damaged ({error}); export it again."
        ) from error


def _ternary_layers(model: nn.Module) -> dict[str, BitLinear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BitLinear) and module.precision == "ternary"
    }


def _compute(layers: Mapping[str, BitLinear]) -> Compute:
    # `int8` and `exact` give the same bits; `exact` runs anywhere.
    modes = {getattr(layer.linear, "compute", "exact") for layer in layers.values()}
    return "fake" if modes == {"fake"} else "exact"


def _stored(name: str, layer: BitLinear) -> StoredTernary:
    parts = layer.parts or (layer.out_features,)
    weights = torch.split(layer.weight.detach(), list(parts))
    if isinstance(layer.linear, TernaryLinearOp):
        pairs = [layer.linear.quantize_weight(weight) for weight in weights]
    else:
        effective = torch.split(layer.effective_weight(), list(parts))
        pairs = [_factored(name, values) for values in effective]
    if any(scale.numel() != 1 for _, scale in pairs):
        raise PackageError(f"Layer {name!r} has one scale a row; a package holds one a part.")
    codes = torch.cat([codes for codes, _ in pairs])
    scales = torch.stack([scale.reshape(()).float() for _, scale in pairs])
    return StoredTernary(codes, scales, tuple(parts))


def _factored(name: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """Splits the effective weight of a foreign arithmetic into codes and scale."""
    scale = values.abs().max().float()
    codes = torch.round(values / scale.clamp_min(torch.finfo(torch.float32).tiny))
    if not torch.equal(codes * scale, values.float()):
        raise PackageError(
            f"The effective weight of layer {name!r} is not ternary codes times one scale; it "
            "cannot be packaged."
        )
    return codes.to(torch.int8), scale


def _packed(stored: Mapping[str, StoredTernary]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, ternary in stored.items():
        tensors[name + _CODES] = pack_i2(ternary.codes).contiguous()
        tensors[name + _SCALES] = ternary.scales
    return tensors


def _unpacked(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StoredTernary:
    try:
        codes = unpack_i2(tensors[name + _CODES], entry["shape"][0])
        return StoredTernary(codes, tensors[name + _SCALES], tuple(entry["parts"]))
    except KeyError as error:
        raise PackageError(
            f"The package lacks {error} of layer {name!r}; export it again."
        ) from error


def _rest(
    model: nn.Module, layers: Mapping[str, BitLinear]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns what stays as it is, shared tensors once, and alias -> name of the others."""
    rest: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if key.removesuffix(".weight") in layers:
            continue
        if id(value) in first:
            tied[key] = first[id(value)]
            continue
        first[id(value)] = key
        rest[key] = cast(Tensor, value).detach().clone()
    return rest, tied
