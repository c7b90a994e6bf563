"""Joins the ranks torchrun started: what must be there, what must be the same, how they part."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from forge_harness.errors import NonFiniteError, UsageError
from forge_harness.training.interruption import TrainingInterrupted
from forge_harness.training.parallel import Parallel, leave, ranks_of
from forge_harness.training.ranks import DistributedError, RankError, Ranks, ToldByFirst, loopback

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The longest wait is for rank 0 to write the package; torch's import took 80 s on a machine loaded
# ten times over.
TIMEOUT_S = 600.0
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")


@contextmanager
def joined(
    parallel: Parallel, device: str = "cpu", timeout_s: float = TIMEOUT_S
) -> Iterator[Ranks]:
    """Yields the ranks torchrun started, once they have met.

    Args:
        parallel: How the model is spread.
        device: `cpu`, over gloo, or `cuda`: the GPU of LOCAL_RANK, over nccl.
        timeout_s: Seconds to wait for a rank that does not answer.

    Raises:
        UsageError: torchrun's environment is not there, or this rank's GPU.
        DistributedError: The ranks did not meet, or one ended without a word.
        ToldByFirst: On other ranks than 0, whatever all of them failed with.
    """
    rank, world_size = _environment(parallel)
    place = _device(device)
    _meet(rank, world_size, device, timeout_s)
    # Not sooner: when something failed, the others would learn of it before this rank has said what
    # it was. Not at all is no choice: the group's threads would abort the process at its very end.
    atexit.register(leave)
    ranks = ranks_of(parallel, place)
    try:
        yield ranks
        ranks.gather(0.0)
    except (RankError, TrainingInterrupted, NonFiniteError) as error:
        if rank == 0:
            raise
        # torchrun ends the others as soon as one has failed: rank 0 goes first.
        with suppress(RuntimeError):
            ranks.gather(0.0)
        raise ToldByFirst(str(error), error.exit_code) from error
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not any(word in text.lower() for word in _LOST):
            raise
        raise DistributedError(
            f"Rank {rank} of {world_size} lost touch with the others ({text:.100}); the rank that "
            "failed says why. --resume goes on from the last checkpoint, if there is one."
        ) from error


def _environment(parallel: str) -> tuple[int, int]:
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"--parallel {parallel} is for ranks that torchrun starts, and the environment lacks "
            f"{', '.join(missing)}; start it as `torchrun --nproc-per-node 2 -m forge_harness "
            f"train --parallel {parallel} ...`."
        )
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE")}
    for name, value in given.items():
        if not value.isdecimal():
            raise UsageError(f"{name} is {value!r}, a number was expected; torchrun sets it.")
    rank, world_size = (int(value) for value in given.values())
    if rank >= world_size:
        raise UsageError(f"RANK {rank} must be below WORLD_SIZE {world_size}; torchrun sets both.")
    return rank, world_size


def _device(device: str) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    found = torch.cuda.device_count()
    if local >= found:
        raise UsageError(
            f"--device cuda needs a GPU for each rank of this machine, and rank {local} of it has "
            f"none: torch {torch.__version__} sees {found}; start fewer ranks, or use --device cpu."
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _meet(rank: int, world_size: int, device: str, timeout_s: float) -> None:
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size) and (name := loopback()):
        # Otherwise gloo resolves the host name, which containers often cannot.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    try:
        dist.init_process_group(
            # gloo as well: counts, losses and what goes wrong are exchanged from the CPU.
            "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
            timeout=timedelta(seconds=timeout_s),
        )
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise DistributedError(
            f"Rank {rank} of {world_size} did not meet the others at {where} within "
            f"{timeout_s:g} s ({' '.join(str(error).split()):.200}); start all of them, and give "
            "each the address of rank 0."
        ) from error
