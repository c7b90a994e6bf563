from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from forge_harness.errors import ConfigError
from forge_harness.protocols import TrainOptions
from forge_harness.training import DistributedError, QATSession, train_distributed

FOREIGN = """
import torch
from forge_harness.training import reference_model

def build(task, seed, precision):
    model = reference_model(task, seed, precision)
    with torch.no_grad():
        model.stem.weight.mul_(3)
    return model

def broken(task, seed, precision):
    raise ValueError("no such model here")
"""


@pytest.fixture
def foreign(tmp_path: Path) -> object:
    """A module loaded from a file, under a name no other process can import."""
    path = tmp_path / "users_file.py"
    path.write_text(FOREIGN)
    spec = importlib.util.spec_from_file_location("forge_subject_of_a_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["forge_subject_of_a_test"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["forge_subject_of_a_test"]


@pytest.mark.timeout(300)
def test_two_ranks_have_the_bits_of_one_process(foreign: object) -> None:
    # Of 1433 samples: the ranks get unequal shares, and of the fifth batch one sample in all.
    fields = {"steps": 6, "batch_size": 358}
    build = foreign.build  # type: ignore[attr-defined]
    state = train_distributed("digits", TrainOptions(**fields), ranks=2, build_model=build)
    session = QATSession("digits", TrainOptions(**fields, accumulation=2), build_model=build)
    records = [session.step() for _ in range(6)]
    assert [len(record.sample_ids) for record in records] == [358, 358, 358, 358, 1, 358]
    expected = session.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.timeout(300)
def test_failing_rank_is_named_with_its_reason(foreign: object) -> None:
    build = foreign.broken  # type: ignore[attr-defined]
    with pytest.raises(DistributedError, match=r"(?s)Rank .*no such model here"):
        train_distributed("digits", TrainOptions(steps=1), ranks=2, build_model=build)


def test_time_is_bounded() -> None:
    with pytest.raises(DistributedError, match=r"had not ended after 0\.1 s"):
        train_distributed("digits", TrainOptions(steps=1), ranks=2, timeout_s=0.1)


@pytest.mark.parametrize(("ranks", "accumulation"), [(0, 1), (65, 1), (2, 3)])
def test_ranks_must_fit_the_batch(ranks: int, accumulation: int) -> None:
    with pytest.raises(ConfigError):
        train_distributed("digits", TrainOptions(accumulation=accumulation), ranks=ranks)


def ranks_below(directory: Path) -> list[int]:
    """Process ids of ranks whose job is below a directory."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = place.read_bytes().decode(errors="replace").split("\0")
            if "forge_harness.training.rank" in words and any(str(directory) in w for w in words):
                found.append(int(place.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks processes up in /proc")
@pytest.mark.timeout(300)
def test_ranks_end_when_who_started_them_is_killed(tmp_path: Path) -> None:
    code = (
        "from forge_harness.protocols import TrainOptions\n"
        "from forge_harness.training import train_distributed\n"
        "train_distributed('digits', TrainOptions(steps=1_000_000, batch_size=8), ranks=2)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        # They are in their steps once they have met.
        until(lambda: len(ranks_below(tmp_path)) == 2 and list(tmp_path.rglob("rendezvous")))
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not ranks_below(tmp_path))


def until(true: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
