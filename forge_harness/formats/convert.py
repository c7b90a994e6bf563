"""From any readable format to any that is written: staged, compared with the source, renamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge_harness.durable import staged_directory, staged_file, sync_file
from forge_harness.errors import (
    CheckpointError,
    DamagedCheckpointError,
    several,
    unknown_choice,
)
from forge_harness.paths import resolved_path

from .checkpoint import FORMATS, Checkpoint, ReadOptions, WriteOptions
from .comparison import Comparison, compared
from .detect import open_checkpoint
from .gguf_writer import write_gguf
from .hf_writer import write_hf_online, write_hf_packed
from .manifest import MANIFEST
from .native import CONFIG, write_native
from .sizes import bytes_on_disk

Writer = Callable[[Checkpoint, Path, WriteOptions], list[str]]

_NAMED = 8
"""Names a note lists; there may be any number."""
_FP32, _BF16 = 2.0**-16, 2.0**-8
"""By how much a conversion moves a scale at most: some formats store its reciprocal, or masters of
which it is the mean, whose sum rounds log2(n) + 1 times in fp32 (2^-19); bf16 rounds by 2^-9."""
_WRITERS: Mapping[str, Writer] = {
    "hf-packed": write_hf_packed,
    "hf-online": write_hf_online,
    "gguf-tq1_0": lambda source, path, options: write_gguf(source, path, "gguf-tq1_0", options),
    "gguf-tq2_0": lambda source, path, options: write_gguf(source, path, "gguf-tq2_0", options),
    "native": lambda source, path, options: write_native(
        source, path, options, extras=source.extras
    ),
}


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion read and wrote.

    Attributes:
        source: Path that was read.
        source_format: Its format.
        destination: Path that was written.
        format: The format asked for.
        source_bytes: Bytes of the source's files.
        destination_bytes: Bytes of the files that were written.
        comparison: Source against result; None when it was not asked for.
        notes: What the user should know, one sentence each.
    """

    source: str
    source_format: str
    destination: str
    format: str
    source_bytes: int
    destination_bytes: int
    comparison: Comparison | None
    notes: tuple[str, ...]


def convert(
    source: Path,
    destination: Path,
    to: str,
    *,
    read: ReadOptions | None = None,
    write: WriteOptions | None = None,
    compare: bool = True,
) -> ConversionReport:
    """Writes a checkpoint in another format; the result is whole and on disk, or not there.

    Args:
        source: File or directory in any readable format.
        destination: New directory, or for GGUF a new file (`model.gguf` inside an existing
            directory).
        to: One of `FORMATS`.
        read: What the source's files cannot say.
        write: Choices within the format.
        compare: Whether to read the result back and compare it with the source.

    Raises:
        CheckpointError: The source cannot be read, the format cannot hold it, or something is in
            the way at `destination`. Nothing was written.
        DamagedCheckpointError: The source does not hold what it claims to hold. Nothing was
            written.
    """
    if to not in FORMATS:
        raise CheckpointError(unknown_choice("format", to, FORMATS))
    target = _target(source, destination, to)
    with open_checkpoint(source, read) as opened:
        notes, comparison = _written(opened, target, to, write or WriteOptions(), compare)
        return ConversionReport(
            source=str(source),
            source_format=opened.format,
            destination=str(target),
            format=to,
            source_bytes=bytes_on_disk(source),
            destination_bytes=bytes_on_disk(target),
            comparison=comparison,
            notes=(*_import_notes(opened), *notes, *_unread_notes(opened)),
        )


def check_outside(source: Path, target: Path) -> None:
    """Refuses a place whose making would change the source.

    Raises:
        CheckpointError: It is the source, or lies inside it.
    """
    if resolved_path(target) == resolved_path(source):
        raise CheckpointError(f"{str(source)!r} is source and destination; name another one.")
    if source.is_dir() and resolved_path(source) in resolved_path(target).parents:
        raise CheckpointError(
            f"{str(target)!r} lies inside the source {str(source)!r}, which is never changed; name "
            "a place outside."
        )


def _target(source: Path, destination: Path, to: str) -> Path:
    gguf = to.startswith("gguf-")
    target = destination / "model.gguf" if gguf and destination.is_dir() else destination
    check_outside(source, target)
    if all(os.path.exists(target.parent / name) for name in (CONFIG, MANIFEST)):
        raise CheckpointError(
            f"{str(target)!r} lies in a package whose {MANIFEST} does not list it, which would be "
            "damage; name a place outside."
        )
    if gguf:
        _refuse_taken(target)
    return target


def _refuse_taken(target: Path) -> None:
    if os.path.lexists(target):
        what = "exists" if target.exists() else "is a link that ends nowhere"
        raise CheckpointError(f"{str(target)!r} {what}; name a new file.")


def _written(
    source: Checkpoint, target: Path, to: str, options: WriteOptions, compare: bool
) -> tuple[list[str], Comparison | None]:
    is_file = to.startswith("gguf-")
    most = _BF16 if to == "hf-online" and options.master_dtype == "BF16" else _FP32
    try:
        with (staged_file if is_file else staged_directory)(target) as stage:
            notes = _WRITERS[to](source, stage, options)
            comparison = _checked(source, stage, target, most) if compare else None
            if is_file:
                # A file gives way to its new content, and another conversion may have been faster.
                sync_file(stage)
                _refuse_taken(target)
            return notes, comparison
    except FileExistsError as error:
        raise CheckpointError(
            f"{str(target)!r} exists and is not an empty directory; name a new one."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {str(target)!r}: {error.strerror or error}. Nothing was written."
        ) from error


def _import_notes(source: Checkpoint) -> list[str]:
    """What became ternary here: the comparison is with its codes, and shows no such loss."""
    made = [name for name in source.ternary_names() if source.infos[name].master]
    if not made or source.format not in ("legacy-safetensors", "legacy-pt"):
        return []
    return [
        f"{several(len(made), 'matrix', 'matrices')} of full precision quantized on import "
        f"({_listed(made)}); --quantize and --exclude choose others."
    ]


def _unread_notes(source: Checkpoint) -> list[str]:
    if not source.unread:
        return []
    return [f"Not carried over from beside the model: {_listed(source.unread)}."]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def _checked(source: Checkpoint, stage: Path, target: Path, most: float) -> Comparison:
    try:
        with open_checkpoint(stage) as result:
            comparison = compared(source, result)
    except DamagedCheckpointError as error:
        if not Path(error.path).is_relative_to(stage):
            raise
        # Named as the user did: the stage is gone when the sentence is read.
        sentence = str(error).replace(str(stage), str(target))
        raise CheckpointError(
            f"The result would not be readable: {sentence} Nothing was written."
        ) from error
    # NaN is not above anything.
    if comparison.codes_changed or comparison.plain_changed or not comparison.scale_change <= most:
        raise DamagedCheckpointError(
            f"The result differs from the source: codes of {comparison.codes_changed} tensors, "
            f"values of {comparison.plain_changed} others, scales by up to "
            f"{comparison.scale_change:.2g} (at most {most:.2g} is rounding). Nothing was kept; "
            "please report this.",
            path=str(source.path),
        )
    return comparison
