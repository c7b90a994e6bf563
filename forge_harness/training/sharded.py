"""Checkpoints of a sharded session: torch's distributed checkpoint in safetensors.

A second layout beside the one file, because an FSDP2 session is nowhere whole: gathered on rank 0
it would need the memory that sharding is there to save. DDP keeps the one file, since every rank
has all of it. Either is read by any number of processes.

step-N/shard-*.safetensors   one a rank, written and made durable by it
step-N/checkpoint.json       what the header of the one file says, and every shard's digest; last

torch's own layout names the shards in a pickle, which would run whatever it holds; this one is
read from the headers of the shards.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from forge_harness.canonical import canonical_json, file_sha256
from forge_harness.durable import staged_directory, sync_file, write_durably
from forge_harness.training.ranks import DistributedError, Ranks

FORMAT = "forge-checkpoint-shards/1"
HEADER = "checkpoint.json"
_SHARDS = "*.safetensors"


def write_shards(
    ranks: Ranks,
    tensors: Mapping[str, Tensor],
    path: Path,
    header: Callable[[dict[str, str]], dict[str, Any]],
) -> None:
    """Writes a state as one directory; returns on all ranks once it is durable.

    Args:
        ranks: All call this together.
        tensors: State by name; what is not sharded is taken from rank 0.
        path: The directory, on a file system all ranks see; replaced when it is there.
        header: Makes the header from the digest of each shard, on rank 0.

    Raises:
        OSError: The file system refused, on rank 0; RankError on the others.
        DistributedError: A rank does not see the directory, or could not write its shard.
    """
    own = {n: t for n, t in tensors.items() if ranks.rank == 0 or isinstance(t, DTensor)}
    with ExitStack() as stack:

        def stage() -> str:
            return str(stack.enter_context(staged_directory(path, replace=True)))

        staged = Path(ranks.first(stage))
        ranks.everywhere(lambda: _require_shared(staged))
        with _as_one_error("write"):
            writer = HuggingFaceStorageWriter(str(staged), save_distributed=True)
            save(own, storage_writer=writer)
        mine = f"shard-{ranks.rank + 1:05d}-*"
        digests = ranks.exchange(ranks.everywhere(lambda: _digests(staged, mine)))

        def commit() -> None:
            together = {name: value for each in digests for name, value in each.items()}
            write_durably(staged / HEADER, canonical_json(header(together)))
            stack.close()

        ranks.first(commit)


def read_header(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    """Returns the header of a checkpoint whose shards are all there and as they were written.

    Raises:
        ValueError: They are not.
        OSError: A file cannot be read.
    """
    header = json.loads((path / HEADER).read_bytes())
    if not isinstance(header, dict) or not isinstance(header.get("shards"), dict):
        raise ValueError(f"{HEADER} does not name its shards")
    found = _digests(path, _SHARDS)
    for name in sorted(found.keys() | header["shards"].keys()):
        if found.get(name) != header["shards"].get(name):
            what = "is missing" if name not in found else "has not the digest it was written with"
            raise ValueError(f"{name} {what}")
    return header


def shard_names(path: Path) -> list[str]:
    """Returns the names of the tensors in a checkpoint."""
    return list(_described(path))


def read_shards(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint, whatever number of ranks wrote it.

    Args:
        path: The directory.
        like: Name -> a tensor whose sharding the one read takes; each rank then reads its rows
            alone. All ranks call this together if any is sharded.

    Raises:
        ValueError: A shard does not hold what its header says.
    """
    tensors = {
        name: torch.zeros_like(like[name], dtype=stored.properties.dtype)
        if name in like and like[name].shape == stored.size
        else torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in _described(path).items()
    }
    alone = not (dist.is_initialized() and any(isinstance(t, DTensor) for t in tensors.values()))
    with _as_one_error("read"), warnings.catch_warnings():
        # That one process is all there is, is what `alone` says.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        reader = HuggingFaceStorageReader(str(path))
        load(tensors, storage_reader=reader, no_dist=alone)
    return tensors


def _described(path: Path) -> dict[str, TensorStorageMetadata]:
    found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return cast("dict[str, TensorStorageMetadata]", found)


def _digests(path: Path, pattern: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in sorted(path.glob(pattern)):
        sync_file(file)
        found[file.name] = f"sha256:{file_sha256(file)}"
    return found


def _require_shared(path: Path) -> None:
    if not path.is_dir():
        raise DistributedError(
            f"The directory {str(path)!r} that rank 0 made is not there; on several machines the "
            "run's directory must be on a file system they share."
        )


@contextmanager
def _as_one_error(verb: str) -> Iterator[None]:
    """Raises the first failure of torch's collection of them, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        rank, (failure, _) = min(error.failures.items())
        kind = ValueError if verb == "read" else DistributedError
        raise kind(f"rank {rank} could not {verb} its shard: {failure}") from error
