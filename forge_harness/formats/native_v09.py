"""The native package, version 0.9: read only. Layout: docs/formats.md, "Native 0.9"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forge_harness.errors import DamagedCheckpointError

from .checkpoint import Checkpoint, Detection, ModelDescription, ReadOptions, TensorInfo
from .native_common import (
    check_finite,
    check_tensors,
    check_version,
    damaged,
    expect,
    model_of,
    read_scales,
    tied_pair,
)
from .safetensors_file import SafetensorsFile
from .strict_json import read_object
from .tensors import RowBlockPacker, TernaryTensor, row_chunks

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
PACKING = "i2-columns"
CODES = ".codes"
INVERSE = ".inv_scale"
_FORMAT = re.compile(r"forge-package/(.*)", re.DOTALL)
_KEYS = {"format", "model", "layers"}


@dataclass
class NativeV09Checkpoint(Checkpoint):
    """An open package of version 0.9 (see `Checkpoint`).

    Codes and plain values are checked when they are read; everything else was when it was opened.

    Attributes:
        file: The weights.
    """

    file: SafetensorsFile = field(kw_only=True)

    def ternary(self, name: str) -> TernaryTensor:
        """See `Checkpoint.ternary`. The scale is 1 / inv_scale, rounded to fp32."""
        rows, columns = self.infos[name].shape
        module = name.removesuffix(".weight")
        packer = RowBlockPacker(rows, columns)
        for start, stop in row_chunks(rows, columns):
            packed = self.file.read_rows(module + CODES, start, stop)
            packer.add(self._fields(name, packed, start, columns))
        return packer.finish(self.scales(name))

    def scales(self, name: str) -> Tensor:
        """See `Checkpoint.scales`."""
        return _scale(self.file, name.removesuffix(".weight"))

    def plain(self, name: str) -> Tensor:
        """See `Checkpoint.plain`."""
        tensor = self.file.read(name)
        check_finite(self.file.path, name, tensor)
        return tensor

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self.file.close()

    def _fields(self, name: str, packed: Tensor, start: int, columns: int) -> Tensor:
        """Returns code + 1 of rows of packed bytes (n, ceil(K / 4)) as uint8 (n, K)."""
        fields = torch.stack([(packed >> shift) & 3 for shift in (6, 4, 2, 0)], dim=2).flatten(1)
        bad = fields == 3
        bad[:, columns:] = fields[:, columns:] != 0
        if bad.any():
            row, column = divmod(int(bad.flatten().int().argmax()), fields.shape[1])
            where = "beyond the last column, expected 0" if column >= columns else "expected 0 to 2"
            byte = (start + row) * packed.shape[1] + column // 4
            damaged(
                self.file.path,
                f"tensor {name!r} holds field {int(fields[row, column])} at row {start + row}, "
                f"column {column} (byte {byte} of the tensor): {where}",
                name,
            )
        return fields[:, :columns]


def recognise(path: Path) -> Detection | None:
    """Returns what makes a directory a native package of version 0.9, or None."""
    file = path / CONFIG
    if not file.is_file():
        return None
    try:
        stated = read_object(file).get("format")
    except DamagedCheckpointError:
        return None
    match = _FORMAT.fullmatch(stated) if isinstance(stated, str) else None
    if match is None:
        return None
    return Detection("native-0.9", (f"{CONFIG} has format {stated!r}",), match[1])


def open_native_v09(path: Path, options: ReadOptions) -> NativeV09Checkpoint:
    """Opens a package of version 0.9. It has no digests: only what it cannot mean is noticed.

    Args:
        path: Its directory.
        options: Nothing in this format needs any.

    Raises:
        CheckpointError: The package is of another version.
        DamagedCheckpointError: A file is missing or does not say what the format demands.
    """
    config = read_object(path / CONFIG)
    _check_config(path / CONFIG, config)
    if not (path / WEIGHTS).is_file():
        damaged(path, f"{WEIGHTS} is missing")
    file = SafetensorsFile(path / WEIGHTS)
    try:
        return _opened(path, config, file)
    except BaseException:
        file.close()
        raise


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    stated = config.get("format")
    match = _FORMAT.fullmatch(stated) if isinstance(stated, str) else None
    if match is None:
        damaged(path, f"format is {stated!r}; expected 'forge-package/0.9'")
    check_version(path, match[1], (0, 9))
    if set(config) != _KEYS:
        wrong = ", ".join(repr(key) for key in sorted(set(config) ^ _KEYS))
        damaged(path, f"key {wrong} is missing or unknown; expected {', '.join(sorted(_KEYS))}")
    if not isinstance(config["layers"], dict):
        damaged(path, f"'layers' is {config['layers']!r}; expected an object")


def _opened(path: Path, config: Mapping[str, Any], file: SafetensorsFile) -> NativeV09Checkpoint:
    model = model_of(path / CONFIG, config["model"])
    infos = _infos(path / CONFIG, config["layers"], file)
    tied = _tied(model, file)
    shapes = {name: info.shape for name, info in infos.items() if name not in tied}
    if problem := check_tensors(model, shapes, tied):
        damaged(file.path, problem[1], problem[0])
    return NativeV09Checkpoint(
        format="native-0.9",
        path=path,
        model=model,
        infos={name: info for name, info in infos.items() if name not in tied},
        version="0.9",
        tied=tied,
        quantization={"packing": PACKING, "scale_convention": "divide", "compute": "exact"},
        file=file,
    )


def _infos(path: Path, layers: Mapping[str, Any], file: SafetensorsFile) -> dict[str, TensorInfo]:
    ternary = {name + CODES: _ternary_info(path, name, layers[name], file) for name in layers}
    inverse = {name + INVERSE for name in layers}
    infos: dict[str, TensorInfo] = {}
    for name, stored in file.tensors.items():
        if name in ternary:
            infos[ternary[name].name] = ternary[name]
        elif name.endswith((CODES, INVERSE)) and name not in inverse:
            damaged(path, f"tensor {name!r} is left over; 'layers' has no such module", name)
        elif name not in inverse:
            infos[name] = TensorInfo(name, "plain", stored.shape, stored.dtype, stored.nbytes)
    return infos


def _ternary_info(path: Path, module: str, shape: object, file: SafetensorsFile) -> TensorInfo:
    name = f"{module}.weight"
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and size > 0 for size in shape)
    ):
        damaged(path, f"layer {module!r} has shape {shape!r}; expected [N, K]", name)
    rows, columns = shape
    expect(file, module + CODES, "U8", (rows, -(-columns // 4)), name)
    _scale(file, module)
    if name in file.tensors:
        damaged(path, f"tensor {name!r} is stored beside its codes", name)
    nbytes = file.tensors[module + CODES].nbytes + file.tensors[module + INVERSE].nbytes
    return TensorInfo(name, "ternary", (rows, columns), PACKING, nbytes, (rows,))


def _scale(file: SafetensorsFile, module: str) -> Tensor:
    """Returns 1 / inv_scale, fp32 [1]."""
    name = f"{module}.weight"
    scale = 1.0 / read_scales(file, module + INVERSE, name, 1)
    if not 0 < float(scale) < float("inf"):
        damaged(file.path, f"tensor {name!r} has a scale that fp32 cannot hold", name)
    return scale


def _tied(model: ModelDescription, file: SafetensorsFile) -> dict[str, str]:
    """Returns alias -> name of what the family stores twice, once both were found equal."""
    pair = tied_pair(model)
    if pair is None or not all(name in file.tensors for name in pair):
        return {}
    head, embedding = (file.tensors[name] for name in pair)
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        _drifted(file, pair, "dtype or shape")
    for start, stop in row_chunks(head.shape[0], head.nbytes // max(1, head.shape[0])):
        one, two = (file.read_rows(name, start, stop).view(torch.uint8) for name in pair)
        if not torch.equal(one, two):
            row = start + int((one != two).flatten(1).any(1).int().argmax())
            _drifted(file, pair, f"row {row}")
    return {pair[0]: pair[1]}


def _drifted(file: SafetensorsFile, pair: tuple[str, str], where: str) -> None:
    damaged(
        file.path,
        f"tensor {pair[0]!r} differs from {pair[1]!r}, to which it is tied, in {where}",
        pair[0],
    )
