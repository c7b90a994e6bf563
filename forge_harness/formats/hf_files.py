"""The safetensors files of a Hugging Face directory as one set of tensors, read strictly.

A directory holds `model.safetensors`, or shards and `model.safetensors.index.json`, which says in
which shard each tensor is. The index is input like any other: it may name no file outside its
directory, and files and index must agree tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.paths import resolved_path

from .checkpoint import files_beside
from .safetensors_file import SafetensorsFile, StoredTensor
from .strict_json import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_SESSION, _SHARDED_SESSION = "forge", "checkpoint.json"
"""What tells a checkpoint of a training session: a key of the header, a file beside the shards."""


class TensorSource(Protocol):
    """Named tensors that are read one at a time, whole or by rows.

    Attributes:
        tensors: Name -> dtype, shape and size, in the order of the files.
    """

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Name -> dtype, shape and size."""

    def read(self, name: str) -> Tensor:
        """Returns a tensor in its stored dtype."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows start..stop of a tensor with at least one dimension."""

    def file_of(self, name: str) -> Path:
        """Returns the file a tensor is in, for messages."""

    def close(self) -> None:
        """Closes the files."""


class TensorFiles:
    """Open safetensors files whose tensors have one name space.

    Args:
        files: Opened, in order.
        unread: Names of the files beside them that are neither theirs nor their configuration.

    Raises:
        DamagedCheckpointError: Two files hold a tensor of the same name.
    """

    def __init__(self, files: list[SafetensorsFile], unread: tuple[str, ...] = ()) -> None:
        self.unread = unread
        self._files = files
        self._owner: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self._owner:
                    raise _damaged(
                        file.path,
                        f"tensor {name!r} is in {self._owner[name].path.name} and in "
                        f"{file.path.name}; expected it once",
                        name,
                    )
                self._owner[name] = file
        self._tensors = {name: file.tensors[name] for name, file in self._owner.items()}
        self._stored_as: dict[str, str] = {}

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Name -> where it is, in the order of the files."""
        return self._tensors

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [file.path for file in self._files]

    def rename(self, stored: str, name: str) -> None:
        """Gives a tensor another name from here on."""
        self._owner[name], self._stored_as[name] = self._owner.pop(stored), stored
        self._tensors = {name if key == stored else key: t for key, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """Returns a tensor, read now; see `SafetensorsFile.read`."""
        return self._owner[name].read(self._stored_as.get(name, name))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows start..stop of a tensor."""
        return self._owner[name].read_rows(self._stored_as.get(name, name), start, stop)

    def file_of(self, name: str) -> Path:
        """Returns the file a tensor is in."""
        return self._owner[name].path

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            file.close()


def holds_safetensors(path: Path) -> bool:
    """Whether a path is a safetensors file, or a directory that holds one or an index of them."""
    if path.is_dir():
        return (path / INDEX).exists() or any(path.glob("*.safetensors"))
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as stream:
        start = stream.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and length <= path.stat().st_size - 8


def open_files(path: Path) -> TensorFiles:
    """Opens the safetensors files of a directory, or one file.

    Raises:
        CheckpointError: Which of several files make up the model cannot be told, or they are the
            checkpoint of a training session.
        DamagedCheckpointError: A file is damaged, index and files disagree, or a name leads out of
            the directory.
    """
    if not path.is_dir():
        return _opened([path])
    if (path / INDEX).exists():
        if (path / SINGLE).exists():
            raise CheckpointError(
                f"{str(path)!r} holds both {SINGLE} and {INDEX}; expected one model. Move away the "
                "one that is not meant, or name a file."
            )
        return _sharded(path)
    if (path / SINGLE).exists():
        return _opened([inside(path, SINGLE, SINGLE)], files_beside(path, {CONFIG, SINGLE}))
    if (path / _SHARDED_SESSION).exists():
        raise _session(path)
    found = sorted(entry.name for entry in path.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(
            f"{str(path)!r} holds {len(found)} safetensors files ({', '.join(found[:4])}) and "
            f"neither {SINGLE} nor {INDEX}, which says how they belong together. Name one file."
        )
    return _opened([inside(path, found[0], found[0])], files_beside(path, {CONFIG, found[0]}))


def inside(directory: Path, name: str, key: str) -> Path:
    """Returns directory / name, which must be a plain name of a file that lies in the directory.

    The Hugging Face cache keeps files as links into `blobs` two levels up; those are followed.

    Raises:
        DamagedCheckpointError: Naming `key`, the place that asked for the file.
    """
    if name in ("", ".", "..") or any(c in name for c in "/\\\0") or ":" in name:
        raise _damaged(
            directory, f"{key} names {name!r}; expected the plain name of a file in the directory"
        )
    path = directory / name
    try:
        target = resolved_path(path)
    except OSError as error:
        raise _damaged(directory, f"{key} names {name!r}, a link that ends nowhere") from error
    home = directory.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(root) for root in allowed):
        raise _damaged(
            directory, f"{key} names {name!r}, a link to {str(target)!r} outside the directory"
        )
    if not target.is_file():
        raise _damaged(directory, f"{key} names {name!r}, and there is no such file")
    return path


def _sharded(directory: Path) -> TensorFiles:
    index = read_object(inside(directory, INDEX, INDEX))
    shard_of = _weight_map(directory / INDEX, index)
    shards = sorted(set(shard_of.values()))
    keys = {shard: name for name, shard in reversed(shard_of.items())}
    paths = [inside(directory, shard, f"{INDEX}, key {keys[shard]!r},") for shard in shards]
    files = _opened(paths, files_beside(directory, {CONFIG, INDEX, *shards}))
    try:
        _check_index(directory / INDEX, shard_of, files)
    except BaseException:
        files.close()
        raise
    return files


def _weight_map(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise _damaged(path, f"weight_map is {found!r:.80}; expected tensor name -> file name")
    for name, shard in found.items():
        if not isinstance(shard, str):
            raise _damaged(path, f"weight_map[{name!r}] is {shard!r:.80}; expected a name", name)
    return found


def _check_index(path: Path, shard_of: Mapping[str, str], files: TensorFiles) -> None:
    for name, shard in shard_of.items():
        if name not in files.tensors:
            raise _damaged(
                path, f"weight_map[{name!r}] points to {shard}, which holds no such tensor", name
            )
    for name in files.tensors:
        actual = files.file_of(name).name
        if shard_of.get(name) != actual:
            listed = f"lists it in {shard_of[name]}" if name in shard_of else "does not list it"
            raise _damaged(path, f"tensor {name!r} is in {actual}, and weight_map {listed}", name)


def _opened(paths: list[Path], unread: tuple[str, ...] = ()) -> TensorFiles:
    files: list[SafetensorsFile] = []
    try:
        for path in paths:
            files.append(SafetensorsFile(path))
            if _SESSION in files[-1].metadata:
                raise _session(path)
        return TensorFiles(files, unread)
    except BaseException:
        for file in files:
            file.close()
        raise


def _session(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} is a checkpoint of a training session, with optimizer and random state; "
        "expected weights alone: name the package of its run, or go on from it with "
        "`forge-harness train` and --resume or --from-checkpoint."
    )


def _damaged(path: Path, what: str, tensor: str = "") -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path}: {what}. Get the files again.", path=str(path), tensor=tensor
    )
