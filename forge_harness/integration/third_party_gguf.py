"""What `gguf` decodes a file to, held against this package's codes and scales, tensor by tensor."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from forge_harness.formats.architecture import renamed, style_of
from forge_harness.formats.checkpoint import Checkpoint
from forge_harness.formats.detect import open_checkpoint

_QUERY_OR_KEY = re.compile(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)")


def tensor_results(gguf: ModuleType, path: Path) -> list[dict[str, Any]]:
    """Returns the fields of a `GGUFTensor` for each tensor of the file.

    Raises:
        CheckpointError: This package refuses the file.
    """
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    heads = _turned_heads(reader)
    with open_checkpoint(path) as checkpoint:
        style = style_of(checkpoint.model.family)
        results = []
        for name, tensor in stored.items():
            own = (renamed(name, "gguf", style) if style else None) or name
            if own not in checkpoint.infos:  # A scale.
                continue
            own_scale = name.removesuffix(".weight") + ".scale" in stored
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            expected = _expected(checkpoint, own, scale_apart=own_scale)
            if turned := _QUERY_OR_KEY.fullmatch(name):
                expected = _turned(expected, heads.get(turned[1], 0))
            results.append(_compared(own, tensor.tensor_type.name, found, expected))
    return results


def _turned_heads(reader: Any) -> dict[str, int]:  # noqa: ANN401 - a GGUFReader
    """Returns the heads of queries and keys whose rows llama.cpp keeps in an order of its own."""
    fields = reader.fields
    if fields["general.architecture"].contents() != "llama":
        return {}
    count = fields["llama.attention.head_count"].contents()
    of_keys = fields.get("llama.attention.head_count_kv")
    return {"q": count, "k": count if of_keys is None else of_keys.contents()}


def _turned(rows: np.ndarray, heads: int) -> np.ndarray:
    """Brings rows into that order: of each head, the two halves by turns.

    As `LlamaModel.permute` of llama.cpp's `convert_hf_to_gguf.py` does; nothing of this package.
    """
    if not heads:
        return rows
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


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
