"""State dicts saved with `torch.save`, opened without running anything that is in them.

The pickle in the archive is first read as a list of instructions: what it would import is held
against the few names a state dict needs. Only then torch's restricted unpickler sees it.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forge_harness.errors import CheckpointError, DamagedCheckpointError

from .checkpoint import Checkpoint, Detection, ModelDescription, ReadOptions, TensorInfo
from .hf_reader import FloatCheckpoint
from .legacy import Selection, select, stored_weights
from .safetensors_file import NAMES, StoredTensor

SUFFIXES = (".pt", ".pth", ".bin")
_NESTED = ("state_dict", "model", "model_state_dict", "module")
_MAX_PICKLE_BYTES = 64 << 20
"""A state dict of 10,000 tensors takes about 1.5 MB of pickle."""
_ALLOWED = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.storage", "UntypedStorage"),
        ("torch.storage", "TypedStorage"),
    }
)
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Short", "Char", "Byte", "Bool")


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
    _scan(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpointError(
            f"{file} is no sound torch archive: {reason}. Save it again.", path=str(file)
        ) from error
    state, where = _unnested(file, content)
    for name, tensor in state.items():
        if tensor.dtype not in NAMES or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{file}: tensor {name!r} is {tensor.dtype}, {tensor.layout}; expected a dense "
                f"tensor of {', '.join(NAMES.values())}."
            )
    return state, (
        "a zip archive with a pickle that imports nothing but tensors",
        f"a state dict of {len(state)} tensors{where}",
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
    return {name: tensor.detach() for name, tensor in state.items()}


def _scan(file: Path) -> None:
    """Refuses an archive whose pickle imports anything a state dict does not need."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise CheckpointError(
                    f"{file} is a zip archive with {len(names)} data.pkl; expected the one of "
                    "torch.save."
                )
            if archive.getinfo(names[0]).file_size > _MAX_PICKLE_BYTES:
                raise DamagedCheckpointError(
                    f"{file}: {names[0]} claims {archive.getinfo(names[0]).file_size} bytes; at "
                    f"most {_MAX_PICKLE_BYTES} are read.",
                    path=str(file),
                )
            raw = archive.read(names[0])
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise _no_archive(file, str(error)) from error
    for module, name, position in _imports(file, raw):
        storage = module == "torch" and name.removesuffix("Storage") in _STORAGES
        if (module, name) not in _ALLOWED and not storage:
            raise CheckpointError(
                f"{file}: byte {position} of data.pkl imports {module}.{name}, which no state dict "
                "needs and which could run code; nothing was loaded. Save a state dict of tensors, "
                "better as safetensors."
            )


def _no_archive(file: Path, why: str) -> CheckpointError:
    with file.open("rb") as stream:
        start = stream.read(4)
    if start == b"PK\x03\x04":
        return DamagedCheckpointError(
            f"{file} is a broken zip archive ({why}). Get the file again.", path=str(file)
        )
    return CheckpointError(
        f"{file} is a bare pickle or another format of old, which is not opened since loading one "
        "runs code; save a state dict with torch.save of torch 1.6 or later, or as safetensors."
    )


def _imports(file: Path, raw: bytes) -> Iterator[tuple[str, str, int]]:
    """Yields (module, name, byte) of everything a pickle imports."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        for opcode, argument, position in pickletools.genops(raw):
            if opcode.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                yield module, name, position or 0
            elif opcode.name == "STACK_GLOBAL":
                module, name = (["?", "?", *strings])[-2:]
                yield module, name, position or 0
            elif opcode.name in ("INST", "EXT1", "EXT2", "EXT4"):
                yield opcode.name, str(argument), position or 0
            _follow(opcode.name, argument, strings, memo)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise DamagedCheckpointError(
            f"{file}: data.pkl is no sound pickle ({error}). Get the file again.", path=str(file)
        ) from error


def _follow(opcode: str, argument: Any, strings: list[str], memo: dict[int, str]) -> None:  # noqa: ANN401
    """Keeps the strings STACK_GLOBAL may take, including those that come back from the memo."""
    if isinstance(argument, str) and opcode not in ("GLOBAL", "INST"):
        strings.append(argument)
    elif opcode == "MEMOIZE" and strings:
        memo[len(memo)] = strings[-1]
    elif opcode in ("BINPUT", "LONG_BINPUT", "PUT") and strings:
        memo[int(argument)] = strings[-1]
    elif opcode in ("BINGET", "LONG_BINGET", "GET") and int(argument) in memo:
        strings.append(memo[int(argument)])
