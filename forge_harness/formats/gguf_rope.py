"""Row order of query and key weights: halves apart in transformers, neighbours in llama.cpp.

Source: `LlamaModel.permute` of llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tensors import RowBlockPacker, TernaryTensor, row_chunks


def obstacle(rows: int, heads: int) -> str | None:
    """Says why rows cannot be reordered over the heads, or None when they can."""
    if heads < 1 or rows % (2 * heads):
        return f"{rows} rows are no even number for each of {heads} heads"
    return None


def interleaving(rows: int, heads: int) -> Tensor:
    """Returns, for every row of llama.cpp's order, its row in transformers' order, int64 (rows,).

    Raises:
        ValueError: Rows are no even number a head.
    """
    if problem := obstacle(rows, heads):
        raise ValueError(problem)
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Brings rows (or the entries of a bias) to llama.cpp's order."""
    return tensor[interleaving(tensor.shape[0], heads)]


def halved(tensor: Tensor, heads: int) -> Tensor:
    """Brings rows (or the entries of a bias) to transformers' order."""
    return tensor[torch.argsort(interleaving(tensor.shape[0], heads))]


def with_rows(ternary: TernaryTensor, order: Tensor) -> TernaryTensor:
    """Returns the tensor whose row i is row order[i] of one with a single part."""
    packer = RowBlockPacker(ternary.rows, ternary.columns)
    quarter = ternary.packed.shape[0]
    for start, stop in row_chunks(ternary.rows, ternary.columns):
        rows = order[start:stop]
        fields = ternary.packed[rows % quarter]
        fields >>= (2 * (rows // quarter)).to(torch.uint8)[:, None]
        packer.add(fields & 3)
    return packer.finish(ternary.scales)
