"""A maker of native packages from docs/formats.md: numpy, json and hashlib only; and a reader."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from forge_harness.durable import staged_directory
from forge_harness.errors import DamagedCheckpointError
from forge_harness.formats import ReadOptions, WriteOptions
from forge_harness.formats.native import open_native, write_native

from .memory import MemoryCheckpoint


def pack(codes: np.ndarray) -> np.ndarray:
    rows, columns = codes.shape
    quarter = -(-rows // 4)
    packed = np.zeros((quarter, columns), np.uint8)
    for row in range(4 * quarter):
        field = codes[row] + 1 if row < rows else np.ones(columns, int)
        packed[row % quarter] += (field * 4 ** (row // quarter)).astype(np.uint8)
    return packed


def unpack(packed: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and the fields of the rows beyond the last."""
    fields = np.concatenate([packed // 4**i % 4 for i in range(4)]).astype(int)
    return fields[:rows] - 1, fields[rows:]


def vouch(directory: Path) -> None:
    """Writes the manifest of what is there."""
    files = []
    for path in sorted(
        p for p in directory.rglob("*") if p.is_file() and p.name != "manifest.json"
    ):
        raw = path.read_bytes()
        name = path.relative_to(directory).as_posix()
        files.append({"path": name, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()})
    content = {"schema": "forge-manifest/1", "files": files}
    (directory / "manifest.json").write_text(json.dumps(content))


CODES = (np.arange(7 * 5) % 3 - 1).reshape(7, 5)
TENSORS = {
    "a.weight": pack(CODES),
    "a.weight_scale": np.array([0.5, 0.3], "f4"),
    "b.weight": pack(-CODES[:4]),
    "b.weight_scale": np.array([1e-3], "f4"),
    "emb.weight": np.arange(6, dtype="f4").reshape(3, 2),
    "half": np.array([1.5, -2], "f2"),
    "count": np.array(7, "i8"),
}
CONFIG = {
    "format": "forge-package",
    "version": "1.0",
    "model": {"family": "unknown", "config": {"x": [1, {"y": None}]}},
    "quantization": {"packing": "i2-rowblock", "scale_convention": "multiply", "compute": "fake"},
    "quantized": {
        "a.weight": {"shape": [7, 5], "parts": [3, 4]},
        "b.weight": {"shape": [4, 5], "parts": [4]},
    },
    "tied": {"head.weight": "emb.weight"},
    "extras": {"step": 3},
}


def make(directory: Path, tensors: dict = TENSORS, config: dict = CONFIG) -> Path:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "forge.json").write_text(json.dumps(config))
    vouch(directory)
    return directory


def read_all(directory: Path) -> dict[str, np.ndarray]:
    with open_native(directory, ReadOptions()) as opened:
        found = {name: opened.ternary(name).codes().numpy() for name in opened.ternary_names()}
        return found | {name: opened.plain(name).float().numpy() for name in opened.plain_names()}


def refuse(directory: Path, what: str, *, tensor: str | None = None) -> None:
    with pytest.raises(DamagedCheckpointError, match=what) as caught:
        read_all(directory)
    assert caught.value.exit_code == 8
    if tensor is not None:
        assert caught.value.tensor == tensor
        assert f"'{tensor}" in str(caught.value)


def written(source: MemoryCheckpoint, directory: Path, **options: object) -> Path:
    with staged_directory(directory, replace=True) as stage:
        assert write_native(source, stage, WriteOptions(), **options) == []  # type: ignore[arg-type]
    return directory
