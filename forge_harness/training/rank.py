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
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import nn

from forge_harness.durable import write_durably
from forge_harness.training.distributed import JOB, STATE, TIMEOUT_S, Job
from forge_harness.training.parallel import DataParallelRanks, leave
from forge_harness.training.session import QATSession


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
    failed = False
    try:
        _train(directory, job)
    except Exception:
        traceback.print_exc()
        failed = True
    # Out here no frame holds the session any more.
    leave()
    sys.exit(failed)


def _train(directory: Path, job: Job) -> None:
    ranks = DataParallelRanks()
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
