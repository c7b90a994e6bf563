"""The ranks of a process group: DDP, and FSDP2 for what one process cannot hold.

Both have the bits of one process that accumulates the same micro-batches, one a rank. On gloo DDP
sums gradients in the order of the ranks, as one process does; gloo's own all-reduce keeps that
order for two ranks only, and so does FSDP2's reduce-scatter. The weights of the micro-batches are
in the loss, so gradients are summed and never averaged.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from forge_harness.errors import ExitCode
from forge_harness.training.ranks import RankError, Ranks

T = TypeVar("T")
Parallel = Literal["ddp", "fsdp2"]
_Told = tuple[ExitCode, str]


class _Group:
    """What both kinds share: the default process group, with gloo for what is on the CPU."""

    shards = False
    parallel: Parallel

    def __init__(self, device: torch.device | None = None) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device or torch.device("cpu")

    def rows_of(self, value: Tensor, like: Tensor) -> Tensor:
        """See `Ranks.rows_of`."""
        if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
            return value
        # Every rank has the whole tensor, so none sends it to the others.
        place = value.to(self.device)
        return distribute_tensor(place, like.device_mesh, like.placements, src_data_rank=None)

    def gather(self, value: float) -> list[float]:
        """See `Ranks.gather`."""
        own = torch.tensor([value], dtype=torch.float64)
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(everyone, own)
        return [float(tensor) for tensor in everyone]

    def exchange(self, value: T) -> list[T]:
        """See `Ranks.exchange`."""
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, value)
        return everyone

    def first(self, call: Callable[[], T]) -> T:
        """See `Ranks.first`."""
        value, error = _attempt(call) if self.rank == 0 else (None, None)
        box: list[Any] = [value, _told(error)]
        dist.broadcast_object_list(box, src=0)
        if error is not None:
            raise error
        value, told = box
        if told is not None:
            raise RankError(told[1], told[0])
        return cast(T, value)

    def everywhere(self, call: Callable[[], T]) -> T:
        """See `Ranks.everywhere`."""
        value, error = _attempt(call)
        told = self.exchange(_told(error))
        if error is not None and self.rank == 0:
            raise error
        for rank, found in enumerate(told):
            if found is not None:
                raise RankError(f"Rank {rank} of {self.world_size}: {found[1]}", found[0])
        return cast(T, value)

    def record(self) -> dict[str, Any]:
        """See `Ranks.record`."""
        return {
            "parallel": self.parallel,
            "world_size": self.world_size,
            "backend": "gloo" if self.device.type == "cpu" else "nccl",
            "device": self.device.type,
            "torch": torch.__version__,
        }


class DataParallelRanks(_Group):
    """Every rank holds the whole model (implements `Ranks`)."""

    parallel = "ddp"
    _wrapped: DistributedDataParallel

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the model in DistributedDataParallel."""
        self._wrapped = DistributedDataParallel(model)
        # DDP compares the hook's annotations with its own types; a lambda has none.
        self._wrapped.register_comm_hook(None, lambda _, bucket: _sum(bucket.buffer()))
        return self._wrapped

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """See `Ranks.accumulating`."""
        # Without it, the hook would sum again what it has summed for the micro-batch before.
        return nullcontext() if last else self._wrapped.no_sync()


class ShardedRanks(_Group):
    """Every rank holds some rows of each weight, gradient and moment (implements `Ranks`).

    A forward has the whole weight of the block it is in: a ternary scale is a mean over all of it.
    """

    parallel = "fsdp2"
    shards = True
    _wrapped: FSDPModule

    def wrap(self, model: nn.Module) -> nn.Module:
        """Shards the model in place, block by block, and returns it."""
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for module in [*_blocks(model), model]:
            sharded = fully_shard(module, mesh=mesh)
            sharded.set_gradient_divide_factor(1.0)
            # Gloo has no other reduction; the default scales in the same pass.
            sharded.set_force_sum_reduction_for_comms(True)
        self._wrapped = cast(FSDPModule, model)
        return model

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """See `Ranks.accumulating`."""
        self._wrapped.set_requires_gradient_sync(last)
        return nullcontext()


def ranks_of(parallel: Parallel, device: torch.device | None = None) -> Ranks:
    """Returns the ranks of the default process group."""
    return ShardedRanks(device) if parallel == "fsdp2" else DataParallelRanks(device)


def leave() -> None:
    """Closes the process group; call it where no session of its ranks is left.

    DDP's reducer would hold the group to the last, and close it without letting go of Python's
    lock, for which the group's own threads may be waiting: the process would never end. Of groups
    closed one after the other the third hung; closed from here, none of 285 did (torch 2.13).
    """
    if not dist.is_initialized():
        return
    group = dist.group.WORLD
    dist.destroy_process_group()
    gc.collect()  # DDP is in cycles.
    del group


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a model, inner ones first as `fully_shard` asks for."""
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.ModuleList):
            yield from module


def _sum(own: Tensor) -> torch.futures.Future[Tensor]:
    if own.device.type != "cpu":
        # Each rank receives two buffers, whatever their number; in order it would be one a rank.
        reduced: Any = dist.all_reduce(own, async_op=True)
        done: torch.futures.Future[Tensor] = reduced.get_future().then(lambda f: f.value()[0])
        return done
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    work: Any = dist.all_gather(everyone, own, async_op=True)

    def add(_: object) -> Tensor:
        total = everyone[0]
        for part in everyone[1:]:
            total = total + part
        return total

    summed: torch.futures.Future[Tensor] = work.get_future().then(add)
    return summed


def _attempt(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return call(), None
    except Exception as error:  # Whatever it is, the others must not wait for this rank.
        return None, error


def _told(error: Exception | None) -> _Told | None:
    if error is None:
        return None
    code = getattr(error, "exit_code", None)
    if code is not None:
        return ExitCode(code), str(error)
    return ExitCode.INTERNAL_ERROR, f"{type(error).__name__}: {error}"
