"""The native package, version 1.0. Layout: docs/formats.md, "Native 1.0"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forge_harness.errors import CheckpointError, DamagedCheckpointError

from .checkpoint import (
    Checkpoint,
    Detection,
    ReadOptions,
    TensorInfo,
    WriteOptions,
    refuse_layer_norms,
)
from .manifest import MANIFEST, Manifest, read_manifest, verify_manifest, write_manifest
from .native_common import (
    check_fields,
    check_finite,
    check_tensors,
    check_version,
    damaged,
    expect,
    model_of,
    read_scales,
    written_json,
)
from .safetensors_file import DTYPES, NAMES, SafetensorsFile, SafetensorsWriter, TensorSpec
from .strict_json import read_object
from .tensors import TernaryTensor

FORMAT = "forge-package"
VERSION = "1.0"
CONFIG = "forge.json"
WEIGHTS = "model.safetensors"
PACKING = "i2-rowblock"
SCALE = "_scale"
COMPUTES = ("exact", "fake")
_KEYS = {"format", "version", "model", "quantization", "quantized", "tied", "extras"}


@dataclass
class NativeCheckpoint(Checkpoint):
    """An open package (see `Checkpoint`).

    Codes and plain values are checked when they are read; everything else was when it was opened.

    Attributes:
        manifest: Files, sizes and digests, as verified.
        file: The weights.
    """

    manifest: Manifest = field(kw_only=True)
    file: SafetensorsFile = field(kw_only=True)

    def ternary(self, name: str) -> TernaryTensor:
        """See `Checkpoint.ternary`."""
        info = self.infos[name]
        ternary = TernaryTensor(self.file.read(name), info.shape[0], self.scales(name), info.parts)
        check_fields(self.file.path, name, ternary)
        return ternary

    def scales(self, name: str) -> Tensor:
        """See `Checkpoint.scales`."""
        return read_scales(self.file, name + SCALE, name, len(self.infos[name].parts))

    def plain(self, name: str) -> Tensor:
        """See `Checkpoint.plain`."""
        tensor = self.file.read(name)
        check_finite(self.file.path, name, tensor)
        return tensor

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self.file.close()


def recognise(path: Path) -> Detection | None:
    """Returns what makes a directory a native package, or None."""
    if not path.is_dir():
        return None
    if (path / CONFIG).is_file():
        try:
            version = read_object(path / CONFIG).get("version")
        except DamagedCheckpointError:
            return Detection("native", (f"{CONFIG} is there, and it cannot be read",))
        reasons = (f"{CONFIG} is there", f"its version is {version!r}")
        return Detection("native", reasons, version if isinstance(version, str) else None)
    try:
        listed = [entry.path for entry in read_manifest(path).files]
    except DamagedCheckpointError:
        return None
    reasons = (f"{MANIFEST} lists {CONFIG}", f"{CONFIG} is missing")
    return Detection("native", reasons) if CONFIG in listed else None


def open_native(path: Path, options: ReadOptions) -> NativeCheckpoint:
    """Opens a package after comparing every file with its manifest.

    Args:
        path: Its directory.
        options: Nothing in this format needs any.

    Raises:
        CheckpointError: The package is of another version.
        DamagedCheckpointError: A file is missing, added or changed, or does not say what the
            format demands.
    """
    manifest = verify_manifest(path)
    for name in (CONFIG, WEIGHTS):
        if name not in {entry.path for entry in manifest.files}:
            damaged(path, f"{MANIFEST} does not list {name!r}, which every package has")
    config = read_object(path / CONFIG)
    _check_config(path / CONFIG, config)
    file = SafetensorsFile(path / WEIGHTS)
    try:
        return _opened(path, config, manifest, file)
    except BaseException:
        file.close()
        raise


def write_native(
    source: Checkpoint,
    directory: Path,
    options: WriteOptions,
    *,
    extras: Mapping[str, Any] | None = None,
    compute: str = "exact",
) -> list[str]:
    """Writes a package into an empty directory, one tensor in memory at a time.

    The caller stages the directory and makes it durable
    (`forge_harness.durable.staged_directory`).

    Args:
        source: What to write; names, family and configuration are kept.
        directory: Existing and empty.
        options: Nothing in this format depends on any.
        extras: The writer's own JSON; None: the source's.
        compute: What the model computes with where the source does not say: "exact" or "fake".

    Returns:
        What the user should know, one sentence each.

    Raises:
        CheckpointError: The format cannot hold the source.
        DamagedCheckpointError: The source holds codes, scales or values that are none.
    """
    config = _config(source, source.extras if extras is None else extras, compute)
    content = written_json(config, CONFIG)
    _check_writable(source)
    (directory / CONFIG).write_bytes(content)
    digest = _write_weights(source, directory / WEIGHTS)
    write_manifest(directory, {WEIGHTS: digest})
    return []


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("format") != FORMAT:
        damaged(path, f"format is {config.get('format')!r}; expected {FORMAT!r}")
    check_version(path, config.get("version"), (1, 0))
    if set(config) != _KEYS:
        wrong = ", ".join(repr(key) for key in sorted(set(config) ^ _KEYS))
        damaged(path, f"key {wrong} is missing or unknown; expected {', '.join(sorted(_KEYS))}")
    for key in ("quantization", "quantized", "tied", "extras"):
        if not isinstance(config[key], dict):
            damaged(path, f"{key!r} is {config[key]!r}; expected an object")
    _check_quantization(path, config["quantization"])
    for alias, name in config["tied"].items():
        if not isinstance(name, str) or name in config["tied"]:
            damaged(path, f"tensor {alias!r} is tied to {name!r}; expected a stored tensor", alias)


def _check_quantization(path: Path, stated: Mapping[str, Any]) -> None:
    known = {"packing": (PACKING,), "scale_convention": ("multiply",), "compute": COMPUTES}
    if set(stated) != set(known):
        damaged(path, f"'quantization' has {sorted(stated)}; expected {sorted(known)}")
    for key, values in known.items():
        if stated[key] not in values:
            damaged(path, f"{key} is {stated[key]!r}; version {VERSION} has {' or '.join(values)}")


def _opened(
    path: Path, config: Mapping[str, Any], manifest: Manifest, file: SafetensorsFile
) -> NativeCheckpoint:
    model = model_of(path / CONFIG, config["model"])
    infos = _infos(path / CONFIG, config["quantized"], file)
    shapes = {name: info.shape for name, info in infos.items()}
    if problem := check_tensors(model, shapes, config["tied"]):
        damaged(file.path, problem[1], problem[0])
    return NativeCheckpoint(
        format="native",
        path=path,
        model=model,
        infos=infos,
        version=config["version"],
        tied=config["tied"],
        quantization=config["quantization"],
        extras=config["extras"],
        manifest=manifest,
        file=file,
    )


def _infos(
    path: Path, quantized: Mapping[str, Any], file: SafetensorsFile
) -> dict[str, TensorInfo]:
    ternary = {name: _ternary_info(path, name, value, file) for name, value in quantized.items()}
    scales = {name + SCALE for name in ternary}
    infos: dict[str, TensorInfo] = {}
    for name, stored in file.tensors.items():
        if name in ternary:
            infos[name] = ternary[name]
        elif name.endswith(".weight" + SCALE) and name not in scales:
            weight = name.removesuffix(SCALE)
            damaged(path, f"tensor {weight!r} has scales and is not in 'quantized'", weight)
        elif name not in scales:
            infos[name] = TensorInfo(name, "plain", stored.shape, stored.dtype, stored.nbytes)
    return infos


def _ternary_info(path: Path, name: str, value: object, file: SafetensorsFile) -> TensorInfo:
    if not name.endswith(".weight"):
        damaged(path, f"'quantized' has {name!r}; expected a name that ends in .weight", name)
    if not isinstance(value, dict) or set(value) != {"shape", "parts"}:
        damaged(path, f"'quantized' has {value!r} for {name!r}; expected shape and parts", name)
    shape, parts = value["shape"], value["parts"]
    if not _counts(shape) or len(shape) != 2:
        damaged(path, f"tensor {name!r} has shape {shape!r}; expected [N, K]", name)
    if not _counts(parts) or sum(parts) != shape[0]:
        damaged(path, f"tensor {name!r} has parts {parts!r}; expected counts that sum to N", name)
    expect(file, name, "U8", (-(-shape[0] // 4), shape[1]), name)
    read_scales(file, name + SCALE, name, len(parts))
    nbytes = file.tensors[name].nbytes + file.tensors[name + SCALE].nbytes
    return TensorInfo(name, "ternary", (shape[0], shape[1]), PACKING, nbytes, tuple(parts))


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and v > 0 for v in value) and bool(value)


def _config(source: Checkpoint, extras: Mapping[str, Any], compute: str) -> dict[str, Any]:
    stated = source.quantization.get("compute", compute)
    if stated not in COMPUTES:
        raise CheckpointError(f"compute {stated!r} is unknown; expected {' or '.join(COMPUTES)}.")
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {"family": source.model.family, "config": dict(source.model.config)},
        "quantization": {
            "packing": PACKING,
            "scale_convention": "multiply",
            "compute": stated,
        },
        "quantized": {
            name: {"shape": list(source.infos[name].shape), "parts": list(source.infos[name].parts)}
            for name in source.ternary_names()
        },
        "tied": dict(source.tied),
        "extras": dict(extras),
    }


def _check_writable(source: Checkpoint) -> None:
    """What `open_native` would refuse must not be written."""
    refuse_layer_norms(source, "a native package")
    scales = {name + SCALE for name in source.ternary_names()}
    for name, info in source.infos.items():
        if info.kind == "ternary" and not name.endswith(".weight"):
            raise CheckpointError(
                f"Ternary tensor {name!r} does not end in .weight; rename it in the source."
            )
        if info.kind == "plain" and (name in scales or name.endswith(".weight" + SCALE)):
            raise CheckpointError(
                f"Tensor {name!r} has a name this format keeps for scales; rename it in the source."
            )
    shapes = {name: info.shape for name, info in source.infos.items()}
    if problem := check_tensors(source.model, shapes, source.tied):
        raise CheckpointError(f"{source.path} does not hold the model it names: {problem[1]}.")


def _write_weights(source: Checkpoint, path: Path) -> str:
    """Writes the tensors and returns the file's sha256."""
    with SafetensorsWriter(path, _specs(source), digest=True) as writer:
        for name in writer.order:
            writer.write(name, _stored(source, name))
        return writer.sha256


def _stored(source: Checkpoint, name: str) -> Tensor:
    """Returns what is stored under a name; nothing else of the source stays in memory."""
    if name not in source.infos:
        return _scales(source, name.removesuffix(SCALE))
    if source.infos[name].kind == "ternary":
        return _padded(source.ternary(name))
    tensor = source.plain(name)
    check_finite(source.path, name, tensor)
    return tensor


def _specs(source: Checkpoint) -> list[TensorSpec]:
    specs = []
    for name, info in source.infos.items():
        if info.kind == "plain":
            specs.append(TensorSpec(name, _dtype(source, info), info.shape))
            continue
        rows, columns = info.shape
        specs.append(TensorSpec(name, "U8", (-(-rows // 4), columns)))
        specs.append(TensorSpec(name + SCALE, "F32", (len(info.parts),)))
    return specs


def _dtype(source: Checkpoint, info: TensorInfo) -> str:
    """Safetensors dtype of a plain tensor; one stored in blocks is known by reading it."""
    if info.layout in DTYPES:
        return info.layout
    return NAMES[source.plain(info.name).dtype]


def _scales(source: Checkpoint, name: str) -> Tensor:
    scales = source.scales(name)
    for scale in scales.tolist():
        if not 0 < scale < float("inf"):
            raise DamagedCheckpointError(
                f"{source.path} has scale {scale} for tensor {name!r}; expected a positive finite "
                "number.",
                path=str(source.path),
                tensor=name,
            )
    return scales


def _padded(ternary: TernaryTensor) -> Tensor:
    """Returns the packed bytes with code 0 in the rows beyond N, whatever was there."""
    packed = ternary.packed
    quarter = packed.shape[0]
    for row in range(ternary.rows, 4 * quarter):
        index, shift = row % quarter, 2 * (row // quarter)
        wanted = (packed[index] & (0xFF ^ (3 << shift))) | (1 << shift)
        if not torch.equal(packed[index], wanted):
            packed = packed.clone() if packed is ternary.packed else packed
            packed[index] = wanted
    return packed
