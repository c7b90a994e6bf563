"""What a training session asks of the processes it is spread over, and the answer of one alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from forge_harness.errors import ConfigError, ExitCode, ForgeError, UsageError

T = TypeVar("T")


class DistributedError(ForgeError):
    """A rank failed, the ranks disagree, or they took too long."""


class RankError(DistributedError):
    """What went wrong on another rank, in its words and with its exit code."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ToldByFirst(RankError):
    """Rank 0 has said what went wrong; this rank ends with the same code and says nothing."""


class Ranks(Protocol):
    """The processes a step is spread over; threads of one process would wait for each other.

    All ranks call the same methods in the same order.

    Attributes:
        rank: This process, from 0.
        world_size: How many there are.
        device: Where this one computes.
        shards: Whether each holds a part of every weight only.
    """

    rank: int
    world_size: int
    device: torch.device
    shards: bool

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the module to call, whose backward sums gradients over the ranks.

        The model itself keeps its names, and its type where it is not sharded.
        """
        ...

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """Backward in the block sums over the ranks if `last`; else gradients stay here."""
        ...

    def rows_of(self, value: Tensor, like: Tensor) -> Tensor:
        """Returns of a whole tensor the rows this rank holds, sharded as `like` is."""
        ...

    def gather(self, value: float) -> list[float]:
        """Returns the value of every rank, in the order of the ranks."""
        ...

    def exchange(self, value: T) -> list[T]:
        """As `gather`, for what can be pickled."""
        ...

    def first(self, call: Callable[[], T]) -> T:
        """Calls on rank 0 alone and returns on all what came of it; RankError where it raised."""
        ...

    def everywhere(self, call: Callable[[], T]) -> T:
        """Calls on each rank, where it may talk to no other; raises on all if one raised.

        Rank 0 raises its own error, or RankError; the others raise RankError.
        """
        ...

    def record(self) -> dict[str, Any]:
        """Returns what a run writes down of its processes, as JSON values."""
        ...


class OneProcess:
    """All micro-batches in this process (implements `Ranks`)."""

    rank = 0
    world_size = 1
    device = torch.device("cpu")
    shards = False

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the model itself."""
        return model

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """Changes nothing: there is nobody to sum with."""
        return nullcontext()

    def rows_of(self, value: Tensor, like: Tensor) -> Tensor:
        """Returns the whole tensor."""
        return value

    def gather(self, value: float) -> list[float]:
        """Returns the one value."""
        return [value]

    def exchange(self, value: T) -> list[T]:
        """Returns the one value."""
        return [value]

    def first(self, call: Callable[[], T]) -> T:
        """Calls."""
        return call()

    def everywhere(self, call: Callable[[], T]) -> T:
        """Calls."""
        return call()

    def record(self) -> dict[str, Any]:
        """Says that it is one process."""
        return {"parallel": None, "world_size": 1, "torch": torch.__version__}


def whole(tensor: Tensor) -> Tensor:
    """Returns a sharded tensor with all its rows, and any other as it is; all ranks must ask."""
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def loopback() -> str | None:
    """Returns the interface of this machine alone; None where it has no name we know."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def check_spread(batch_size: int, accumulation: int, world_size: int) -> None:
    """Refuses a batch that cannot be dealt evenly: every rank makes as many forwards as the others.

    Raises:
        ConfigError: There are more ranks than samples, or micro-batches are left over.
    """
    if not 1 <= world_size <= batch_size:
        raise ConfigError(
            f"ranks {world_size} must be from 1 to the batch of {batch_size} samples.", key="ranks"
        )
    if accumulation > 1 and accumulation % world_size:
        raise ConfigError(
            f"accumulation {accumulation} over {world_size} ranks must be 1 or a multiple of "
            f"{world_size}: each rank takes as many micro-batches.",
            key="accumulation",
        )


def refuse_alone_among_ranks() -> None:
    """Refuses to train as one process where several were started for it.

    Raises:
        UsageError: Each of them would write the same directory.
    """
    ranks = os.environ.get("WORLD_SIZE", "")
    if "RANK" in os.environ and ranks.isdecimal() and int(ranks) > 1:
        raise UsageError(
            f"WORLD_SIZE says that {ranks} ranks were started, and each would train the whole run "
            "into one directory; add --parallel ddp or --parallel fsdp2, or start one process."
        )


def refuse_disagreement(ranks: Ranks, facts: Mapping[str, object]) -> None:
    """Refuses to train where the ranks were started from different things.

    Args:
        ranks: All of them.
        facts: What must be the same, by the name it has in the message; JSON values.

    Raises:
        UsageError: It is not, on rank 0.
        RankError: The same, on the others.
    """
    everyone = ranks.exchange(dict(facts))

    def compare() -> None:
        for rank, others in enumerate(everyone):
            for name in facts:
                if others.get(name) != facts[name]:
                    raise UsageError(
                        f"Rank {rank} has {name} {others.get(name)!r}, and rank 0 has "
                        f"{facts[name]!r}; start all ranks with one command, configuration and "
                        "environment."
                    )

    ranks.first(compare)
