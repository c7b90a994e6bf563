"""What a state may hold, as files and back: bytes, text, trees of tensors, files, directories.

JSON and safetensors only: reading a state never runs code. A tree (a `state_dict`, an optimizer's
state) is a JSON skeleton beside one safetensors file; what JSON cannot say (integer keys, tuples,
non-finite floats, tensors, arrays) is an object with one marked key.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_harness.errors import StateError

from .state_kinds import shown

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

DATA = "data"
_TENSORS, _ARRAYS = "tensors.safetensors", "arrays.safetensors"
_TENSOR, _ARRAY, _TUPLE, _PAIRS, _FLOAT = "$tensor", "$array", "$tuple", "$pairs", "$float"
_MARKS = frozenset({_TENSOR, _ARRAY, _TUPLE, _PAIRS, _FLOAT})
_DEEPEST = 64
_LONGEST_INTEGER_BITS = 8192
"""Under 4,300 digits: Python writes and reads no more of them as text."""


@dataclass(frozen=True, slots=True)
class EncodedValue:
    """A value as the files of a state.

    Attributes:
        encoding: How to read them back: bytes, text, json, tree, file or directory.
        files: Relative POSIX path -> content, or the path of a file that holds it.
    """

    encoding: str
    files: Mapping[str, bytes | Path]


@dataclass(slots=True)
class _Leaves:
    """Tensors and arrays met on the way down a tree, each under a running number."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


def encode(data: object) -> EncodedValue:
    """Returns a value as files.

    Args:
        data: bytes, str, a path of a file or directory, or a tree of mappings, lists and tuples
            with JSON values, torch tensors and NumPy arrays as leaves.

    Raises:
        StateError: A path is missing, or a leaf is of another type; says where.
    """
    if isinstance(data, bytes | bytearray | memoryview):
        return EncodedValue("bytes", {DATA: bytes(data)})
    if isinstance(data, str):
        return EncodedValue("text", {DATA: _utf8(data)})
    if isinstance(data, Path):
        return _encode_path(data)
    leaves = _Leaves()
    skeleton = _down(data, leaves, "data", 0)
    files: dict[str, bytes | Path] = {DATA: json.dumps(skeleton, allow_nan=False).encode()}
    if leaves.tensors:
        from safetensors.torch import save as save_tensors

        files[_TENSORS] = save_tensors(leaves.tensors)
    if leaves.arrays:
        from safetensors.numpy import save as save_arrays

        files[_ARRAYS] = save_arrays(leaves.arrays)
    return EncodedValue("tree" if len(files) > 1 or _is_marked(skeleton) else "json", files)


def decode(encoding: str, names: tuple[str, ...], read: Callable[[str], bytes]) -> Any:  # noqa: ANN401
    """Returns the value that was encoded; of a file its bytes, of a directory bytes by path.

    Args:
        encoding: As `encode` said.
        names: Of the state's files.
        read: Content of one of them, verified.

    Raises:
        StateError: The encoding is none of ours: a newer version wrote it.
    """
    if encoding in ("bytes", "file"):
        return read(names[0])
    if encoding == "directory":
        return {name: read(name) for name in names}
    if encoding == "text":
        return read(DATA).decode()
    if encoding not in ("json", "tree"):
        raise StateError(
            f"A state is encoded as {encoding!r}, which this version does not know; expected "
            "bytes, text, json, tree, file or directory: use the version that wrote it."
        )
    skeleton = json.loads(read(DATA))
    return skeleton if encoding == "json" else _up(skeleton, _read_leaves(names, read))


def _encode_path(path: Path) -> EncodedValue:
    if path.is_file():
        return EncodedValue("file", {path.name: path})
    if not path.is_dir():
        if path.exists():
            raise StateError(
                f"{str(path)!r} is no plain file or directory, which is all a state can hold; save "
                "what comes out of it as a file."
            )
        raise StateError(
            f"There is no file or directory {str(path)!r} to save; give an existing path, or the "
            "content as bytes."
        )
    entries = sorted(path.rglob("*"))
    for entry in entries:
        if reason := _why_not_kept(entry):
            raise StateError(f"{str(entry)!r} is {reason}.")
    files = {p.relative_to(path).as_posix(): p for p in entries if p.is_file()}
    if not files:
        raise StateError(f"{str(path)!r} holds no file to save; give a directory with content.")
    return EncodedValue("directory", files)


def _why_not_kept(entry: Path) -> str:
    """Returns what an entry of a directory is that would be lost, with the remedy; "" otherwise."""
    if entry.is_symlink():
        return "a symbolic link, which a state cannot hold; replace it by what it points to"
    if entry.is_dir():
        if next(entry.iterdir(), None) is None:
            return "an empty directory, which a state cannot hold; remove it, or put a file in it"
    elif not entry.is_file():
        return "no plain file, which is all a state can hold; remove it"
    return ""


def _down(value: object, leaves: _Leaves, where: str, depth: int) -> Any:  # noqa: ANN401 - JSON
    if depth > _DEEPEST:
        raise StateError(
            f"The value at {where[:80]} is nested over {_DEEPEST} levels deep; flatten it."
        )
    if value is None or isinstance(value, bool | str):
        return value
    if type(value) is int:
        return _checked_integer(value, where)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: repr(float(value))}
    if isinstance(value, Mapping):
        return _down_mapping(value, leaves, where, depth)
    if isinstance(value, list | tuple):
        items = [_down(x, leaves, f"{where}[{i}]", depth + 1) for i, x in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    leaf = _leaf(value, leaves, where)
    if leaf is None:
        raise StateError(
            f"The value at {where} is a {type(value).__name__}, which a state cannot hold; "
            "expected JSON values, tensors or arrays (nothing is pickled)."
        )
    return leaf


def _down_mapping(value: Mapping[Any, Any], leaves: _Leaves, where: str, depth: int) -> Any:  # noqa: ANN401
    plain = all(isinstance(key, str) for key in value) and not _MARKS.intersection(value)
    if plain:
        return {k: _down(v, leaves, f"{where}[{k!r}]", depth + 1) for k, v in value.items()}
    pairs = [
        [
            _down(k, leaves, f"key of {where}", depth + 1),
            _down(v, leaves, f"{where}[{shown(k)}]", depth + 1),
        ]
        for k, v in value.items()
    ]
    return {_PAIRS: pairs}


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise StateError(
            f"The text has {text[error.start]!r} at character {error.start}, which UTF-8 cannot "
            "hold; give the content as bytes."
        ) from None


def _checked_integer(value: int, where: str) -> int:
    if value.bit_length() > _LONGEST_INTEGER_BITS:
        raise StateError(
            f"The value at {where} is an integer of {value.bit_length()} bits; expected at most "
            f"{_LONGEST_INTEGER_BITS}: give it as bytes."
        )
    return value


def _leaf(value: object, leaves: _Leaves, where: str) -> dict[str, str] | None:
    # Whoever made a tensor or an array has imported its library; a state without needs neither.
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        _check_tensor(value, where)
        name = str(len(leaves.tensors))
        # A copy: safetensors refuses tensors that share memory, as tied weights do.
        leaves.tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        _check_array(value, where)
        name = str(len(leaves.arrays))
        leaves.arrays[name] = numpy.ascontiguousarray(value).reshape(numpy.shape(value))
        return {_ARRAY: name}
    return None


def _check_tensor(tensor: Tensor, where: str) -> None:
    """Refuses a tensor without content, or of a form or type that safetensors does not have."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save

    if tensor.is_meta:
        raise StateError(
            f"The tensor at {where} is on the meta device and has no content to save; give it "
            "values first."
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        form = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise StateError(
            f"The tensor at {where} is {form}, which a state cannot hold; make it dense first "
            "(`to_dense`, `to_padded_tensor`)."
        )
    try:
        save({"": torch.empty(0, dtype=tensor.dtype)})
    except (KeyError, SafetensorError):  # its writers for torch and for numpy
        raise StateError(_no_type("tensor", where, str(tensor.dtype))) from None


def _check_array(array: NDArray[Any], where: str) -> None:
    """Refuses an array of a type that safetensors does not have, or that would lose its mask."""
    import numpy
    from safetensors import SafetensorError
    from safetensors.numpy import save

    if isinstance(array, numpy.ma.MaskedArray):
        raise StateError(
            f"The array at {where} is masked, which a state cannot hold; save data and mask."
        )
    try:
        save({"": numpy.empty(0, array.dtype)})
    except (KeyError, SafetensorError):
        raise StateError(_no_type("array", where, str(array.dtype))) from None


def _no_type(what: str, where: str, dtype: str) -> str:
    return (
        f"The {what} at {where} is of {dtype}, which a state cannot hold (nothing is pickled); "
        "expected numbers or booleans of a type that safetensors has: convert it, or use a list."
    )


def _is_marked(skeleton: object) -> bool:
    if isinstance(skeleton, dict):
        return bool(_MARKS.intersection(skeleton)) or any(map(_is_marked, skeleton.values()))
    return isinstance(skeleton, list) and any(map(_is_marked, skeleton))


def _read_leaves(names: tuple[str, ...], read: Callable[[str], bytes]) -> _Leaves:
    leaves = _Leaves()
    if _TENSORS in names:
        from safetensors.torch import load as load_tensors

        leaves.tensors = load_tensors(read(_TENSORS))
    if _ARRAYS in names:
        from safetensors.numpy import load as load_arrays

        leaves.arrays = load_arrays(read(_ARRAYS))
    return leaves


def _up(value: Any, leaves: _Leaves) -> Any:  # noqa: ANN401 - JSON in, the tree out
    if isinstance(value, list):
        return [_up(item, leaves) for item in value]
    if not isinstance(value, dict):
        return value
    mark = next(iter(value)) if len(value) == 1 else ""
    if mark == _TENSOR:
        return leaves.tensors[value[mark]]
    if mark == _ARRAY:
        return leaves.arrays[value[mark]]
    if mark == _TUPLE:
        return tuple(_up(item, leaves) for item in value[mark])
    if mark == _PAIRS:
        return {_up(key, leaves): _up(item, leaves) for key, item in value[mark]}
    if mark == _FLOAT:
        return float(value[mark])
    return {key: _up(item, leaves) for key, item in value.items()}
