"""Sizes of checkpoints: on disk, and what the same weights would take unquantized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .checkpoint import TensorInfo


@dataclass(frozen=True, slots=True)
class Sizes:
    """Weights and bytes of a checkpoint.

    Attributes:
        file_bytes: Bytes of all its files.
        ternary_weights: Weights stored as codes.
        plain_weights: The others.
        ternary_bytes: Stored bytes of the ternary tensors, scales and padding included.
        fp32_bytes: Bytes of all weights in fp32.
        bf16_bytes: Bytes of all weights in bf16.
    """

    file_bytes: int
    ternary_weights: int
    plain_weights: int
    ternary_bytes: int
    fp32_bytes: int
    bf16_bytes: int

    @property
    def bits_per_ternary_weight(self) -> float:
        """Stored bits a ternary weight; 0 when there is none."""
        return 8 * self.ternary_bytes / self.ternary_weights if self.ternary_weights else 0.0


def bytes_on_disk(path: Path) -> int:
    """Returns the bytes of a file, or of all files below a directory (as `du -b` on the files)."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())


def sizes_of(path: Path, infos: Iterable[TensorInfo]) -> Sizes:
    """Returns the sizes of a checkpoint from its files and its table of tensors."""
    table = list(infos)
    ternary = [info for info in table if info.kind == "ternary"]
    weights = sum(prod(info.shape) for info in table)
    coded = sum(prod(info.shape) for info in ternary)
    return Sizes(
        file_bytes=bytes_on_disk(path),
        ternary_weights=coded,
        plain_weights=weights - coded,
        ternary_bytes=sum(info.nbytes for info in ternary),
        fp32_bytes=4 * weights,
        bf16_bytes=2 * weights,
    )
