"""Training over several gloo processes of this machine, with the bits of one process.

Each rank takes one of `ranks` micro-batches of every batch. Gradients are summed in the order of
the ranks, as one process sums its micro-batches; gloo's own all-reduce keeps that order for two
ranks only.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, MethodType

from safetensors.torch import load_file
from torch import Tensor

from forge_harness.errors import ConfigError
from forge_harness.imports import import_paths, python_program
from forge_harness.protocols import TrainOptions
from forge_harness.training.data import DataSource
from forge_harness.training.ingredients import BuildModel, Loss
from forge_harness.training.ranks import DistributedError, check_spread, loopback
from forge_harness.training.recipe import resolve_recipe

JOB = "job.pickle"
STATE = "state.safetensors"
# torch's import dominates: two ranks of ten steps take 8 s on an idle machine, and took 80 s on
# one loaded ten times over.
TIMEOUT_S = 180.0
_POLL_S = 0.05
_OUTPUT_TAIL = 400


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank is told. Crosses processes by pickle, in a private directory."""

    task: str
    options: TrainOptions
    build_model: BuildModel | None
    load: DataSource | None
    loss: Loss | None


def train_distributed(
    task: str,
    options: TrainOptions,
    *,
    ranks: int,
    build_model: BuildModel | None = None,
    load: DataSource | None = None,
    loss: Loss | None = None,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Tensor]:
    """Returns the state dict after `options.steps` steps (see `TrainsDistributed`).

    It equals, bit for bit, that of one process with `accumulation=ranks`, unless the model draws
    random numbers while it trains (dropout): every rank begins with the generators of one process.

    Args:
        task: As for `QATSession`.
        options: As for `QATSession`; `accumulation` must be 1 or `ranks`.
        ranks: Processes, one thread each.
        build_model: As for `QATSession`. A function or method that is importable by name, or
            defined in a file that can be imported alone; so are the next two.
        load: As for `QATSession`.
        loss: As for `QATSession`.
        timeout_s: Seconds after which all ranks are ended.

    Raises:
        ConfigError: The options do not fit the ranks.
        DistributedError: A rank failed, the ranks disagree, or the time is over.
    """
    _check(task, options, ranks)
    with tempfile.TemporaryDirectory(prefix="forge-ranks-") as name:
        directory = Path(name)
        parts = (build_model, load, loss)
        job = pickle.dumps(Job(task, options, *parts))
        (directory / JOB).write_bytes(pickle.dumps((_modules(parts), job)))
        _run_ranks(directory, ranks, timeout_s)
        digests = {(directory / f"rank-{rank}.sha256").read_text() for rank in range(ranks)}
        if len(digests) != 1:
            raise DistributedError(
                f"After {options.steps} steps the {ranks} ranks hold {len(digests)} different "
                "models; gradients were not the same on all of them."
            )
        return load_file(directory / STATE)


def _check(task: str, options: TrainOptions, ranks: int) -> None:
    check_spread(resolve_recipe(task, options).batch_size, options.accumulation, ranks)
    # With more of them the ranks would sum in another order than one process does.
    if options.accumulation not in (1, ranks):
        raise ConfigError(
            f"accumulation {options.accumulation} over {ranks} ranks must be 1 or {ranks}: each "
            "rank takes one micro-batch.",
            key="accumulation",
        )


def _run_ranks(directory: Path, ranks: int, timeout_s: float) -> None:
    outputs = [directory / f"rank-{rank}.log" for rank in range(ranks)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, output in enumerate(outputs):
            with output.open("wb") as stream:
                processes.append(
                    subprocess.Popen(
                        [*python_program("forge_harness.training.rank"), str(directory)],
                        env=_environment(rank, ranks),
                        # Nothing is written; its end tells the rank that this process is gone.
                        stdin=subprocess.PIPE,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                )
        _wait(processes, outputs, timeout_s)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], outputs: Sequence[Path], timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                tail = outputs[rank].read_text(errors="replace").strip()[-_OUTPUT_TAIL:]
                raise DistributedError(
                    f"Rank {rank} of {len(codes)} ended with code {code}: {tail}"
                )
        if None not in codes:
            return
        if time.monotonic() > deadline:
            raise DistributedError(
                f"{codes.count(None)} of {len(codes)} ranks had not ended after {timeout_s:g} s."
            )
        time.sleep(_POLL_S)


def _environment(rank: int, ranks: int) -> dict[str, str]:
    environment = {
        **os.environ,
        "PYTHONPATH": import_paths(),
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    if name := loopback():
        # Otherwise gloo resolves the host name, which containers often cannot.
        environment["GLOO_SOCKET_IFNAME"] = name
    return environment


def _modules(parts: Sequence[object]) -> list[tuple[str, str]]:
    """Returns (name, file) of the modules pickle will look names up in, bases first.

    A module that was loaded from a file under a name of its own cannot be imported by that name
    in another process; the rank loads it from the file instead.
    """
    found: dict[str, str] = {}
    for part in parts:
        owner = part.__self__ if isinstance(part, MethodType) else part
        if isinstance(owner, FunctionType):
            names = [owner.__module__]
        else:
            names = [base.__module__ for base in reversed(type(owner).__mro__)]
        for name in names:
            file = getattr(sys.modules.get(name), "__file__", None)
            if file and name != "__main__":
                found[name] = file
    return list(found.items())
