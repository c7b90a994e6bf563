"""One rank of a distributed run: `python -m forge_harness.training.rank DIRECTORY`.

Started by `forge_harness.training.distributed` with RANK and WORLD_SIZE in its environment.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pickle
import stat
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from forge_harness.durable import write_durably
from forge_harness.training.distributed import JOB, STATE, TIMEOUT_S, Job
from forge_harness.training.session import QATSession


class GlooRanks:
    """The ranks of the default process group (implements `Ranks`)."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the model in DistributedDataParallel with gradients summed in rank order."""
        parallel = DistributedDataParallel(model)
        # DDP compares the hook's annotations with its own types; a lambda has none.
        parallel.register_comm_hook(None, lambda _, bucket: _ordered_sum(bucket.buffer()))
        return parallel

    def gather(self, value: float) -> list[float]:
        """Returns the value of every rank, in the order of the ranks."""
        own = torch.tensor([value], dtype=torch.float64)
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(everyone, own)
        return [float(tensor) for tensor in everyone]


def main(directory: Path) -> None:
    """Runs the job of a directory as the rank the environment names."""
    _end_with_parent()
    torch.set_num_threads(1)
    job = _read_job(directory)
    dist.init_process_group(
        "gloo",
        # A file needs no free port, which another process could take between choice and use.
        init_method=f"file://{directory / 'rendezvous'}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        ranks = GlooRanks()
        session = QATSession(
            job.task,
            job.options,
            build_model=job.build_model,
            load=job.load,
            loss=job.loss,
            ranks=ranks,
        )
        for _ in range(job.options.steps):
            session.step()
        _write_result(directory, ranks.rank, session.model)
    finally:
        dist.destroy_process_group()


def _end_with_parent() -> None:
    """Ends this process when the other end of its standard input is gone.

    A parent that is killed cannot end its ranks, and they would train to the last step for nobody.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _read_job(directory: Path) -> Job:
    modules, pickled = pickle.loads((directory / JOB).read_bytes())
    for name, file in modules:
        _import(name, Path(file))
    job = pickle.loads(pickled)
    assert isinstance(job, Job)
    return job


def _import(name: str, file: Path) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


def _ordered_sum(own: Tensor) -> torch.futures.Future[Tensor]:
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    work: Any = dist.all_gather(everyone, own, async_op=True)

    def add(_: object) -> Tensor:
        total = everyone[0]
        for part in everyone[1:]:
            total = total + part
        return total

    summed: torch.futures.Future[Tensor] = work.get_future().then(add)
    return summed


def _write_result(directory: Path, rank: int, model: nn.Module) -> None:
    # Clones: safetensors refuses tied tensors, the caller gets a plain state dict.
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    content = save(state)
    if rank == 0:
        write_durably(directory / STATE, content)
    digest = hashlib.sha256(content).hexdigest()
    (directory / f"rank-{rank}.sha256").write_text(digest, encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
