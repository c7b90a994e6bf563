"""What files are, and the reader that opens them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from forge_harness.errors import CheckpointError

from . import gguf_reader, hf_reader, native, native_v09, pt
from .checkpoint import (
    IMPORTED,
    STATES_CONVENTION,
    Checkpoint,
    Detection,
    ReadOptions,
    unknown_format,
)
from .pointers import refuse_pointer

_READERS: tuple[tuple[ModuleType, str], ...] = (
    (gguf_reader, "open_gguf"),
    (native, "open_native"),
    (native_v09, "open_native_v09"),
    (pt, "open_pt"),
    (hf_reader, "open_hf"),
)
"""In the order they are asked: each knows its own files by their content and leaves the rest."""


def detect(path: Path) -> Detection:
    """Says what a checkpoint is, from its files alone.

    Args:
        path: File or directory.

    Raises:
        CheckpointError: Nothing is there, or no reader knows it.
        DamagedCheckpointError: A reader knows it, and its outermost structure is broken.
    """
    with _readable(path):
        return _recognised(path)[0]


def open_checkpoint(path: Path, options: ReadOptions | None = None) -> Checkpoint:
    """Opens a checkpoint of any readable format.

    Args:
        path: File or directory.
        options: What the files cannot say.

    Raises:
        CheckpointError: It is no checkpoint, something must be told (the message names the
            option), or something was told that its format does not ask.
        DamagedCheckpointError: It does not hold what it claims to hold.
    """
    told = options or ReadOptions()
    with _readable(path):
        _, module, opener = _recognised(path)
        opened: Checkpoint = getattr(module, opener)(path, told)
    if unheard := _unheard(opened, told):
        opened.close()
        raise CheckpointError(
            f"{str(path)!r} is {opened.format}, where {unheard} changes nothing; leave it out."
        )
    return opened


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says of what the operating system refuses that it was to be read; commands write as well."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{str(error.filename or path)!r} cannot be read: {error.strerror or error}; expected "
            "files of a checkpoint that can be."
        ) from error


def _unheard(opened: Checkpoint, told: ReadOptions) -> str:
    """Returns an option that changes nothing for a checkpoint, or ""."""
    asked = {
        "--quantize": (told.quantize, opened.format in IMPORTED),
        "--exclude": (told.exclude, opened.format in IMPORTED),
        "--i2s-layout": (told.i2s_layout, "i2s_layout" in opened.quantization),
        "--scale-convention": (told.scale_convention, opened.format in STATES_CONVENTION),
    }
    return next((name for name, (given, heard) in asked.items() if given and not heard), "")


def _recognised(path: Path) -> tuple[Detection, ModuleType, str]:
    if not path.exists():
        raise CheckpointError(f"{str(path)!r} does not exist; expected a checkpoint to read.")
    _refuse_special(path)
    for module, opener in _READERS:
        found: Detection | None = module.recognise(path)
        if found is not None:
            return found, module, opener
    raise unknown_format(path, _seen(path))


def _refuse_special(path: Path) -> None:
    """Refuses pipes, sockets and devices, which would be waited for or never end."""
    for entry in (path, *(path.iterdir() if path.is_dir() else ())):
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise CheckpointError(
                f"{str(entry)!r} is a pipe, a socket or a device; expected files of a checkpoint."
            )


def _seen(path: Path) -> str:
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        alone = [name for name in names if name.endswith((".gguf", *pt.SUFFIXES))]
        if len(alone) > 1:
            return f"the directory holds {', '.join(alone[:6])}, which may each be one; name it"
        return f"the directory holds {', '.join(names[:6]) or 'nothing'}"
    refuse_pointer(path)
    with path.open("rb") as stream:
        return f"the file starts with {stream.read(8)!r}"
