"""Conversions against the least they can do: reading the source and writing the result durably."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from forge_harness.formats.checkpoint import (
    FORMATS,
    Checkpoint,
    ModelDescription,
    TensorInfo,
    WriteOptions,
)
from forge_harness.formats.convert import convert
from forge_harness.formats.native import write_native
from forge_harness.formats.sizes import bytes_on_disk
from forge_harness.formats.tensors import TernaryTensor

from .timing import disturbed_of, interleave, samples_of, speedup, void_of

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
"""Weights of one block of a 7B model: attention, up and down."""
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class ConversionRow:
    """One conversion.

    Attributes:
        to: Format that was written.
        compared: Whether the result was read back and compared with the source.
        seconds: Median.
        read_bytes: Of the source.
        written_bytes: Of the result.
        copy_seconds: Median of reading and durably writing as many bytes, in turns.
        times: (estimate, low, high) of how many times longer the conversion takes; None for too
            few rounds.
        samples: "convert" and "copy" -> seconds of each round.
        disturbed: The same -> whether another process took the core.
        void: Candidates and ratios of which too few rounds were undisturbed; see `timing.void_of`.
    """

    to: str
    compared: bool
    seconds: float
    read_bytes: int
    written_bytes: int
    copy_seconds: float
    times: tuple[float, float, float] | None
    samples: dict[str, list[float]] = field(repr=False, default_factory=dict)
    disturbed: dict[str, list[bool]] = field(repr=False, default_factory=dict)
    void: list[str] = field(default_factory=list)


def measured(
    place: Path,
    *,
    source: Path | None = None,
    targets: Sequence[str] = FORMATS,
    blocks: int = 2,
    rounds: int = 7,
    told: Callable[[str], None] = lambda what: None,
) -> Iterator[ConversionRow]:
    """Times conversions in a scratch directory below `place`, which is removed again.

    Args:
        place: Directory on the disk to measure.
        source: Checkpoint to convert; None: random codes in the shapes of a 7B model.
        targets: Formats to write.
        blocks: Sets of `SHAPES` in the source that is made.
        rounds: Turns of each candidate, 6 at least for bounds.
        told: Told what is measured next.

    Yields:
        Two rows a format: without the comparison, and with it.

    Raises:
        CheckpointError: The source cannot be read, or a format cannot hold it.
        OSError: The disk is full, or cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="forge-bench-", dir=place) as scratch:
        folder = Path(scratch)
        if source is None:
            told("making a source")
            source = folder / "source"
            _make(source, blocks)
        for to in targets:
            for compared in (False, True):
                told(f"{to}{', compared' if compared else ''}")
                yield _row(folder, source, to, compared, rounds)


def _row(folder: Path, source: Path, to: str, compared: bool, rounds: int) -> ConversionRow:
    target = folder / ("out.gguf" if to.startswith("gguf-") else "out")
    sizes: list[int] = []

    def ours() -> None:
        _remove(target)
        sizes.append(convert(source, target, to, compare=compared).destination_bytes)

    def copy() -> None:
        _remove(folder / "copy")
        _copy(source, folder / "copy", sizes[-1])

    # Warm, and the size of the result is known to the first copy.
    ours()
    timed = interleave({"convert": ours, "copy": copy}, rounds=rounds, batch=0.0)
    times = speedup(timed["copy"], timed["convert"])
    row = ConversionRow(
        to,
        compared,
        timed["convert"].median,
        bytes_on_disk(source),
        sizes[-1],
        timed["copy"].median,
        None if times is None else (times.estimate, times.low, times.high),
        samples_of(timed),
        disturbed_of(timed),
        void_of(timed, [("convert", "copy")]),
    )
    _remove(target)
    _remove(folder / "copy")
    return row


def _copy(source: Path, target: Path, size: int) -> None:
    """Reads all of the source, and writes `size` bytes and has them on disk."""
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    left, chunk = size, b""
    with target.open("wb") as writer:
        for file in files:
            with file.open("rb") as reader:
                while read := reader.read(_CHUNK):
                    chunk = read if len(read) >= len(chunk) else chunk
                    left -= writer.write(read[:left])
        while left:
            left -= writer.write(chunk[:left])
        writer.flush()
        os.fsync(writer.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _make(directory: Path, blocks: int) -> None:
    directory.mkdir()
    write_native(_random(blocks), directory, WriteOptions())


def _random(blocks: int) -> Checkpoint:
    shapes = {
        f"layers.{block}.{index}.weight": shape
        for block in range(blocks)
        for index, shape in enumerate(SHAPES)
    }
    infos = {
        name: TensorInfo(name, "ternary", shape, "i2-rowblock", shape[0] * shape[1] // 4, shape[:1])
        for name, shape in shapes.items()
    }
    return _Random("random", Path("random"), ModelDescription("unknown", {}), infos)


class _Random(Checkpoint):
    """Random codes; every tensor is made when it is asked for."""

    def ternary(self, name: str) -> TernaryTensor:
        rows, columns = self.infos[name].shape
        fields = torch.randint(0, 3, (4, rows // 4, columns), dtype=torch.uint8)
        packed = fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6
        return TernaryTensor(packed, rows, torch.tensor([0.05]), (rows,))

    def plain(self, name: str) -> Tensor:
        raise KeyError(name)

    def close(self) -> None:
        """Nothing is open."""
