"""Keys of our own, which other readers ignore: what a GGUF file has no place for.

| key | value |
|---|---|
| `forge.model` | canonical JSON, `{"family": ..., "config": ...}` of the source |
| `forge.tensors` | names of the ternary tensors |
| `forge.scales` | their scales, exact, F32, in the same order |
| `forge.columns` | their K, in the same order; only where a row was padded to whole blocks |
| `forge.tied` | canonical JSON, alias -> name |
| `forge.compute` | "exact" or "fake", of a native package |
| `forge.extras` | canonical JSON, further facts of the source |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import ModelDescription
from .gguf_file import GgufFile, Value, damaged
from .gguf_types import TERNARY
from .native_common import model_of
from .strict_json import parse_object

MODEL = "forge.model"
TENSORS = "forge.tensors"
SCALES = "forge.scales"
COLUMNS = "forge.columns"
TIED = "forge.tied"
COMPUTE = "forge.compute"
EXTRAS = "forge.extras"


@dataclass(frozen=True, slots=True)
class Notes:
    """What a file records under our keys.

    Attributes:
        model: Family and configuration of the source; None: not recorded.
        scales: Tensor of the file -> its exact scale.
        columns: Tensor of the file -> its K.
        tied: Alias -> stored name; None: not recorded.
        compute: "exact" or "fake"; None: not recorded.
        extras: Further facts.
    """

    model: ModelDescription | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    columns: Mapping[str, int] = field(default_factory=dict)
    tied: Mapping[str, str] | None = None
    compute: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


def read_notes(file: GgufFile) -> Notes:
    """Returns what a file records.

    Raises:
        DamagedCheckpointError: A key is not as described above.
    """
    path, metadata = file.path, file.metadata
    names = _names(file)
    tied = _object(path, metadata, TIED)
    for alias, name in (tied or {}).items():
        if not isinstance(name, str):
            raise damaged(path, f"key {TIED!r} ties {alias!r} to {name!r}; expected a name", alias)
    model = _object(path, metadata, MODEL)
    compute = metadata.get(COMPUTE)
    if compute not in (None, "exact", "fake"):
        raise damaged(path, f"key {COMPUTE!r} is {compute!r}; expected 'exact' or 'fake'")
    return Notes(
        model=None if model is None else model_of(path, model),
        scales=_scales(path, metadata, names),
        columns=_columns(file, names),
        tied=tied,
        compute=None if compute is None else str(compute),
        extras=_object(path, metadata, EXTRAS) or {},
    )


def _names(file: GgufFile) -> list[str]:
    names = file.metadata.get(TENSORS, [])
    if not isinstance(names, list):
        raise damaged(file.path, f"key {TENSORS!r} is no array of strings")
    if len(set(names)) != len(names):
        raise damaged(file.path, f"key {TENSORS!r} names a tensor twice")
    for name in names:
        if name not in file.tensors or file.tensors[name].type.id not in TERNARY:
            raise damaged(
                file.path, f"key {TENSORS!r} names {name!r}, which is no ternary tensor", name
            )
    return names


def _scales(path: Path, metadata: Mapping[str, Value], names: list[str]) -> dict[str, float]:
    values = metadata.get(SCALES)
    if values is None and not names:
        return {}
    if not isinstance(values, np.ndarray) or values.dtype != np.float32:
        raise damaged(path, f"key {SCALES!r} is no array of F32")
    if len(values) != len(names):
        raise damaged(
            path, f"key {SCALES!r} has {len(values)} values for {len(names)} in {TENSORS!r}"
        )
    found = {name: float(value) for name, value in zip(names, values, strict=True)}
    for name, value in found.items():
        if not 0 < value < float("inf"):
            raise damaged(
                path,
                f"key {SCALES!r} has {value} for tensor {name!r}; expected a positive number",
                name,
            )
    return found


def _columns(file: GgufFile, names: list[str]) -> dict[str, int]:
    values = file.metadata.get(COLUMNS)
    if values is None:
        return {}
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu":
        raise damaged(file.path, f"key {COLUMNS!r} is no array of counts")
    if len(values) != len(names):
        raise damaged(
            file.path, f"key {COLUMNS!r} has {len(values)} values for {len(names)} in {TENSORS!r}"
        )
    found = {name: int(value) for name, value in zip(names, values, strict=True)}
    for name, value in found.items():
        tensor = file.tensors[name]
        block, stored = tensor.type.block, tensor.shape[-1]
        if not value > 0 or -(-value // block) * block != stored:
            raise damaged(
                file.path,
                f"key {COLUMNS!r} has {value} for tensor {name!r}, whose rows hold {stored} values",
                name,
            )
    return found


def _object(path: Path, metadata: Mapping[str, Value], key: str) -> dict[str, Any] | None:
    text = metadata.get(key)
    if text is None:
        return None
    if not isinstance(text, str):
        raise damaged(path, f"key {key!r} is no string")
    return parse_object(text.encode(), path)
