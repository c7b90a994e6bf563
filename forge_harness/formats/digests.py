"""Digests of tensors that do not depend on how a format stores them."""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

from .tensors import TernaryTensor, row_chunks


def codes_sha256(ternary: TernaryTensor) -> str:
    """Returns the hexadecimal SHA-256 of the codes: N * K int8, row by row."""
    digest = hashlib.sha256()
    for start, stop in ternary.chunks():
        digest.update(ternary.codes(start, stop).contiguous().numpy().data)
    return digest.hexdigest()


def packed_sha256(ternary: TernaryTensor) -> str:
    """Returns the hexadecimal SHA-256 of the codes four a byte, in row blocks.

    Fields of rows beyond the last go in as code 0. A quarter of the bytes of `codes_sha256`: for
    comparing tensors, whatever stored them.
    """
    quarter = ternary.packed.shape[0]
    sound = ternary.packed
    beyond = [divmod(row, quarter) for row in range(ternary.rows, 4 * quarter)]
    digest = hashlib.sha256()
    first = min((offset for _, offset in beyond), default=quarter)
    for start, stop in row_chunks(first, ternary.columns):
        digest.update(sound[start:stop].contiguous().numpy().data)
    rest = sound[first:].clone()
    for field, offset in beyond:
        row = rest[offset - first]
        row &= 0xFF ^ (3 << (2 * field))
        row |= 1 << (2 * field)
    digest.update(rest.numpy().data)
    return digest.hexdigest()


def values_sha256(tensor: Tensor) -> str:
    """Returns the hexadecimal SHA-256 of shape and values, the same for bf16, fp16 and fp32.

    Values go in as fp32 (float64 and integers as they are), so that a cast that loses nothing does
    not show.
    """
    digest = hashlib.sha256(struct.pack(f"<{tensor.dim()}q", *tensor.shape))
    flat = tensor.reshape(-1)
    for start, stop in row_chunks(flat.shape[0], 1):
        piece = flat[start:stop]
        if piece.dtype in (torch.float16, torch.bfloat16):
            piece = piece.float()
        digest.update(piece.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
