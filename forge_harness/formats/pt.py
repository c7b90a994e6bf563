"""State dicts saved with `torch.save`, opened without running anything that is in them.

Only an archive that `pt_archive` found sound is seen by torch's restricted unpickler.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from forge_harness.errors import CheckpointError, DamagedCheckpointError, several

from .checkpoint import (
    Checkpoint,
    Detection,
    ModelDescription,
    ReadOptions,
    TensorInfo,
    files_beside,
)
from .hf_checkpoint import FloatCheckpoint
from .hf_found import SCALE
from .legacy import Selection, select, stored_weights
from .pt_archive import UNSOUND, check_archive, check_content
from .safetensors_file import NAMES, StoredTensor, encodable, is_empty_matrix

SUFFIXES = (".pt", ".pth", ".bin")
_NESTED = ("state_dict", "model", "model_state_dict", "module")


class _Tensors:
    """The tensors of a state dict, mapped from the file; a `TensorSource`."""

    def __init__(self, path: Path, state: Mapping[str, Tensor]) -> None:
        self._path = path
        self._state = state
        self._tensors = {
            name: StoredTensor(
                name, NAMES[t.dtype], tuple(t.shape), 0, t.numel() * t.element_size()
            )
            for name, t in state.items()
        }

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    def read(self, name: str) -> Tensor:
        return self._state[name].clone()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._state[name][start:stop].clone()

    def file_of(self, name: str) -> Path:
        return self._path

    def close(self) -> None:
        self._state = {}


def recognise(path: Path) -> Detection | None:
    """Says whether a path is a saved state dict, or a directory with exactly one.

    Raises:
        CheckpointError: It is a pickle that must not be opened, or not a state dict.
        DamagedCheckpointError: The archive is broken.
    """
    file = _file(path)
    if file is None:
        return None
    state, reasons = _state_dict(file)
    selection = _selection(file, state, ReadOptions())
    return Detection("legacy-pt", (*reasons, f"quantized on import: {selection.rule}"))


def open_pt(path: Path, options: ReadOptions) -> Checkpoint:
    """Opens a saved state dict; its matrices are quantized when read.

    Raises:
        CheckpointError: It is a pickle that must not be opened, or not a state dict.
        DamagedCheckpointError: The archive is broken.
    """
    file = _file(path)
    assert file is not None
    check_content(file)
    state, _ = _state_dict(file)
    source = _Tensors(file, state)
    weights = stored_weights(source, _selection(file, state, options).ternary)
    infos = {
        name: TensorInfo(
            name,
            "ternary" if name in weights else "plain",
            stored.shape,
            stored.dtype,
            stored.nbytes,
            stored.shape[:1] if name in weights else (),
            master=name in weights and weights[name].storage == "master",
        )
        for name, stored in source.tensors.items()
    }
    return FloatCheckpoint(
        format="legacy-pt",
        path=path,
        model=ModelDescription("unknown", {}),
        infos=infos,
        unread=files_beside(path, {file.name}) if path.is_dir() else (),
        source=source,
        weights=weights,
    )


def _selection(file: Path, state: Mapping[str, Tensor], options: ReadOptions) -> Selection:
    return select(_Tensors(file, state), "unknown", None, options)


def _file(path: Path) -> Path | None:
    if path.is_dir():
        found = [entry for entry in path.iterdir() if entry.suffix in SUFFIXES]
        others = any(path.glob("*.safetensors")) or (path / "forge.json").exists()
        return found[0] if len(found) == 1 and not others else None
    with path.open("rb") as stream:
        start = stream.read(4)
    known = start == b"PK\x03\x04" or (path.suffix in SUFFIXES and start != b"GGUF")
    return path if known else None


def _state_dict(file: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    check_archive(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UNSOUND as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _damaged(file, reason) from error
    state, where = _unnested(file, content)
    for name, tensor in state.items():
        _check_tensor(file, name, tensor)
    return state, (
        "a zip archive with a pickle that imports nothing but tensors",
        f"a state dict of {several(len(state), 'tensor')}{where}",
    )


def _check_tensor(file: Path, name: str, tensor: Tensor) -> None:
    if not encodable(name):
        raise _damaged(file, f"tensor name {name!r} is no valid Unicode")
    if tensor.dtype not in NAMES or tensor.layout != torch.strided:
        raise CheckpointError(
            f"{file}: tensor {name!r} is {tensor.dtype}, {tensor.layout}; expected a dense "
            f"tensor of {', '.join(NAMES.values())}."
        )
    needed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if needed > stored:
        # A view that repeats values: a kilobyte may claim terabytes.
        raise _damaged(
            file, f"tensor {name!r} {list(tensor.shape)} takes {needed} bytes and has {stored}"
        )
    if is_empty_matrix(name, tuple(tensor.shape)):
        raise _damaged(file, f"tensor {name!r} has shape {list(tensor.shape)}; expected values")


def _damaged(file: Path, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{file} is no sound torch archive: {what}. Save it again.", path=str(file)
    )


def _unnested(file: Path, content: object) -> tuple[dict[str, Tensor], str]:
    if _is_state(content):
        assert isinstance(content, dict)
        return _flat(file, content), ""
    inner = [
        key for key in _NESTED if isinstance(content, dict) and _is_state(content.get(key, None))
    ]
    if len(inner) != 1:
        kind = sorted(map(str, content))[:6] if isinstance(content, dict) else type(content)
        raise CheckpointError(
            f"{file} holds {kind}; expected a state dict (name -> tensor), or one under the key "
            f"{' or '.join(map(repr, _NESTED))}: save model.state_dict()."
        )
    assert isinstance(content, dict)
    return _flat(file, content[inner[0]]), f" under the key {inner[0]!r}"


def _is_state(content: object) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def _flat(file: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in state.items():
        if tensor.dtype is torch.int8 and name.endswith(".weight"):
            raise CheckpointError(
                f"{file}: tensor {name!r} is int8, the packed layout of Microsoft's GPU kernels, "
                "which is not read; convert the Hugging Face checkpoint it was made from."
            )
        if name.endswith(".weight") and name + SCALE in state:
            raise CheckpointError(
                f"{file}: tensor {name!r} has a scale beside it, {name + SCALE!r}, and weights "
                "with scales are read from safetensors only; save them as such, with config.json."
            )
    return {name: tensor.detach().resolve_neg() for name, tensor in state.items()}
