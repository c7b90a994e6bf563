"""Looks into a checkpoint: what it is, every tensor's codes and scales, and what is odd."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from forge_harness.errors import DamagedCheckpointError

from .checkpoint import Anomaly, Checkpoint, Detection, ReadOptions, TensorInfo
from .detect import detect, open_checkpoint
from .digests import codes_sha256, values_sha256
from .sizes import Sizes, sizes_of
from .tensors import TernaryTensor

DENSITY = (0.4, 0.85)
"""Share of codes that are not 0 in a trained weight: 0.61 for Laplace, 0.69 for normal and 0.75 for
uniform weights under absmean; absmax ternarization falls to about 0.15."""
IMBALANCE_SIGMAS = 6.0
"""Excess of one sign, in standard deviations of a fair coin, that is worth a look."""
SCALE_SPREAD = 1e3
"""Largest over smallest scale of a checkpoint that is worth a look; 2B4T spans about 20."""


@dataclass(frozen=True, slots=True)
class CodeCounts:
    """How often each code occurs in a tensor."""

    minus: int
    zero: int
    plus: int

    @property
    def density(self) -> float:
        """Share of codes that are not 0."""
        total = self.minus + self.zero + self.plus
        return (self.minus + self.plus) / total if total else 0.0


@dataclass(frozen=True, slots=True)
class InspectedTensor:
    """One tensor of an inspection.

    Attributes:
        info: Name, shape, layout, bytes.
        counts: Of the codes; None for a plain tensor.
        scales: One a part; () for a plain tensor.
        sha256: Of the codes as int8, row by row; of shape and values for a plain tensor. None when
            it could not be read.
    """

    info: TensorInfo
    counts: CodeCounts | None = None
    scales: tuple[float, ...] = ()
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint is and holds.

    Attributes:
        path: What was looked at.
        detection: What the files are, and why.
        checkpoint: Model, quantization facts and ties as the reader found them; None when it could
            not be opened.
        tensors: Every tensor, in the order of the files.
        sizes: Weights and bytes; None when it could not be opened.
        anomalies: Odd, but readable.
        damage: One sentence for each thing that is not as the files claim.
    """

    path: Path
    detection: Detection
    checkpoint: Checkpoint | None
    tensors: tuple[InspectedTensor, ...]
    sizes: Sizes | None
    anomalies: tuple[Anomaly, ...]
    damage: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether it was read whole and nothing is damaged."""
        return self.checkpoint is not None and not self.damage


def inspect_checkpoint(path: Path, options: ReadOptions | None = None) -> Inspection:
    """Reads every tensor of a checkpoint and says what is odd or damaged.

    A question that `options` leave open is no error here: the inspection then ends with the
    detection.

    Args:
        path: File or directory.
        options: What the files cannot say.

    Raises:
        CheckpointError: It is no checkpoint of a known format.
        DamagedCheckpointError: So damaged that its format cannot be told.
    """
    options = options or ReadOptions()
    detection = detect(path)
    if detection.questions and options == ReadOptions():
        return Inspection(path, detection, None, (), None, (), ())
    try:
        checkpoint = open_checkpoint(path, options)
    except DamagedCheckpointError as error:
        return Inspection(path, detection, None, (), None, (), (str(error),))
    with checkpoint:
        return _read_all(path, detection, checkpoint)


def count_codes(ternary: TernaryTensor) -> CodeCounts:
    """Counts the codes of a tensor, chunk by chunk."""
    total = torch.zeros(3, dtype=torch.int64)
    for start, stop in ternary.chunks():
        total += torch.bincount(ternary.fields(start, stop).flatten(), minlength=3)
    minus, zero, plus = total.tolist()
    return CodeCounts(minus, zero, plus)


def _read_all(path: Path, detection: Detection, checkpoint: Checkpoint) -> Inspection:
    tensors: list[InspectedTensor] = []
    damage: list[str] = []
    for name, info in checkpoint.infos.items():
        try:
            tensors.append(_inspected(checkpoint, name, info))
        except DamagedCheckpointError as error:
            tensors.append(InspectedTensor(info))
            damage.append(str(error))
    return Inspection(
        path,
        detection,
        checkpoint,
        tuple(tensors),
        sizes_of(path, checkpoint.infos.values()),
        (*checkpoint.anomalies, *_odd(tensors)),
        tuple(damage),
    )


def _inspected(checkpoint: Checkpoint, name: str, info: TensorInfo) -> InspectedTensor:
    if info.kind == "plain":
        return InspectedTensor(info, sha256=values_sha256(checkpoint.plain(name)))
    ternary = checkpoint.ternary(name)
    return InspectedTensor(
        info,
        count_codes(ternary),
        tuple(float(scale) for scale in ternary.scales),
        codes_sha256(ternary),
    )


def _odd(tensors: Iterable[InspectedTensor]) -> list[Anomaly]:
    found: list[Anomaly] = []
    scales: dict[str, float] = {}
    for tensor in tensors:
        if tensor.counts is None:
            continue
        name = tensor.info.name
        found += [Anomaly(what, name) for what in _odd_codes(tensor.counts)]
        scales |= {f"{name}[{i}]": scale for i, scale in enumerate(tensor.scales)}
    if scales and max(scales.values()) > SCALE_SPREAD * min(scales.values()):
        low, high = min(scales, key=scales.__getitem__), max(scales, key=scales.__getitem__)
        found.append(
            Anomaly(
                f"scales span {scales[low]:.3g} ({low}) to {scales[high]:.3g} ({high}); over a "
                f"factor of {SCALE_SPREAD:g} one of them is rarely right"
            )
        )
    return found


def _odd_codes(counts: CodeCounts) -> list[str]:
    nonzero = counts.minus + counts.plus
    total = nonzero + counts.zero
    # Below a few hundred weights any share is within chance.
    spread = 6 * math.sqrt(0.25 / total) if total else 1.0
    found = []
    if not DENSITY[0] - spread <= counts.density <= DENSITY[1] + spread:
        found.append(
            f"density {counts.density:.3f}; a trained absmean weight has {DENSITY[0]} to "
            f"{DENSITY[1]}: quantized twice, by absmax, or not ternary at all?"
        )
    if abs(counts.plus - counts.minus) > IMBALANCE_SIGMAS * math.sqrt(max(nonzero, 1)):
        found.append(
            f"{counts.minus} codes are -1 and {counts.plus} are +1, more uneven than chance: is "
            "the packing order or the field order another one?"
        )
    return found
