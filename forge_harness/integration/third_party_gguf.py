"""What `gguf` decodes a file to, held against this package's codes and scales, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from forge_harness.formats.architecture import renamed, style_of
from forge_harness.formats.checkpoint import Checkpoint
from forge_harness.formats.detect import open_checkpoint


def tensor_results(gguf: ModuleType, path: Path) -> list[dict[str, Any]]:
    """Returns the fields of a `GGUFTensor` for each tensor of the file.

    Raises:
        CheckpointError: This package refuses the file.
    """
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    with open_checkpoint(path) as checkpoint:
        style = style_of(checkpoint.model.family)
        results = []
        for name, tensor in stored.items():
            own = renamed(name, "gguf", style) if style else name
            if own is None or own not in checkpoint.infos:
                continue
            own_scale = name.removesuffix(".weight") + ".scale" in stored
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            expected = _expected(checkpoint, own, scale_apart=own_scale)
            results.append(_compared(own, tensor.tensor_type.name, found, expected))
    return results


def _expected(checkpoint: Checkpoint, name: str, *, scale_apart: bool) -> np.ndarray:
    if checkpoint.infos[name].kind == "plain":
        return checkpoint.plain(name).float().numpy()
    ternary = checkpoint.ternary(name)
    codes = ternary.codes().numpy().astype(np.float32)
    if scale_apart:
        return codes
    return codes * ternary.row_scales().numpy().astype(np.float16).astype(np.float32)


def _compared(name: str, layout: str, found: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    found = found.reshape(-1, found.shape[-1])
    wide = np.zeros_like(found)
    # A row shorter than a block is padded with zeros, which must come out as such.
    wide[:, : expected.shape[-1]] = expected.reshape(-1, expected.shape[-1])
    difference = np.abs(found - wide)
    return {
        "name": name,
        "layout": layout,
        "values": int(wide.size),
        "differing": int(np.count_nonzero(~(difference == 0))),
        "worst": float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0)),
    }
