"""The command under the real torchrun: two gloo processes of this machine against one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from forge_harness.cli.app import _run
from forge_harness.cli.train import train_command
from forge_harness.errors import ExitCode
from forge_harness.training.checkpoint import CheckpointError, read_checkpoint
from forge_harness.training.keeping import DirectoryCheckpoints
from forge_harness.training.ranks import loopback
from forge_harness.training.run_directory import newest_checkpoint

pytestmark = pytest.mark.timeout(400)

# Imports are most of it: 6 s on an idle machine, 80 s on one loaded ten times over.
TIMEOUT_S = 180.0
STEPS, KEPT = 6, 4
# 98,624 parameters in two blocks. Steps 0 to 5 have gradient norms of 8.7 to 3.5: all are clipped.
MODEL = "[model]\nwidth = 64\nlayers = 2\nheads = 2\nhidden = 128\n"


class Place:
    """A directory of runs of one recipe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "forge.toml"
        self.config.write_text(MODEL)

    def arguments(self, name: str, *more: str) -> list[str]:
        config = ["--config", str(self.config)]
        return ["train", "--out", str(self.path / name), *config, *more]

    def new(self, name: str, *more: str) -> list[str]:
        """A run of six steps of two micro-batches; what is repeated in `more` wins."""
        recipe = ["--task", "bytes", "--steps", str(STEPS), "--batch-size", "4"]
        recipe += ["--accumulation", "2", "--checkpoint-every", "2"]
        return self.arguments(name, *recipe, *more)

    def alone(self, arguments: Sequence[str]) -> None:
        assert _run(lambda: train_command.main(list(arguments[1:]), standalone_mode=False)) == 0

    def ranks(self, arguments: Sequence[str]) -> str:
        done = torchrun(arguments)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def stopped(self, source: str, name: str) -> Path:
        """A run as it was when it died after four of its six steps."""
        path = self.path / name
        shutil.copytree(self.path / source, path)
        newest = newest_checkpoint(path)
        shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
        (path / "metrics.json").unlink()
        shutil.rmtree(path / "package")
        assert newest_checkpoint(path).stem == f"step-{KEPT}"
        return path

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def torchrun(
    arguments: Sequence[str], *, script: str | None = None
) -> subprocess.CompletedProcess[str]:
    with started(arguments, script=script) as process:
        _, errors = process.communicate(timeout=TIMEOUT_S)
    return subprocess.CompletedProcess(arguments, process.returncode, "", errors)


@contextmanager
def started(
    arguments: Sequence[str], *, script: str | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Yields a torchrun of two ranks; nothing of it is left afterwards."""
    command = ["-m", "forge_harness"] if script is None else ["--no-python", "sh", "-c", script]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [sys.executable, *launcher, *command, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        # Each rank is in a session of its own.
        ranks = [] if process.poll() is not None else psutil.Process(process.pid).children()
        for each in [process, *ranks]:
            each.kill()
        process.communicate()


def records(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same(run: Path, other: Path) -> None:
    """Weights, moments, positions, step lines, quality and package, all to the last bit."""
    mine, theirs = (read_checkpoint(newest_checkpoint(path))[1] for path in (run, other))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not mine[name].equal(theirs[name])] == ["random.python_gauss"]
    assert torch.isnan(mine["random.python_gauss"])  # None is pending, here and there.
    assert records(run) == records(other)
    for key in ("loss", "accuracy", "data_digest", "parameters", "package_bytes"):
        assert result(run)[key] == result(other)[key]
    weights = [(path / "package" / "model.safetensors").read_bytes() for path in (run, other)]
    assert weights[0] == weights[1]


def result(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "metrics.json").read_bytes())
    return found


def processes(run: Path) -> list[tuple[object, ...]]:
    told = result(run)["processes"]
    assert told == json.loads((run / "training.json").read_bytes())["processes"]
    assert all(each["torch"] == torch.__version__ for each in told)
    return [(each["from_step"], each["parallel"], each["world_size"]) for each in told]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """`one`, `ddp` and `fsdp2`: one process, and two of each kind."""
    place = Place(tmp_path_factory.mktemp("runs"))
    place.alone(place.new("one"))
    for parallel in ("ddp", "fsdp2"):
        place.ranks(place.new(parallel, "--parallel", parallel))
    return place


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_have_the_bits_of_one_process(runs: Place, parallel: str) -> None:
    assert_same(runs / parallel, runs / "one")
    assert processes(runs / parallel) == [(0, parallel, 2)]
    assert all(float(str(record["grad_norm"])) > 1.0 for record in records(runs / parallel))


def test_sharded_checkpoint_is_written_by_both_ranks_and_loads_in_one(runs: Place) -> None:
    path = newest_checkpoint(runs / "fsdp2")
    sizes = [file.stat().st_size for file in sorted(path.glob("*.safetensors"))]
    assert len(sizes) == 2
    assert min(sizes) > 0.4 * sum(sizes)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("harm", ["flipped", "missing", "foreign", "no header"])
def test_damaged_shard_gives_way_to_the_checkpoint_before(
    runs: Place, tmp_path: Path, harm: str
) -> None:
    kept = DirectoryCheckpoints(tmp_path / "checkpoints")
    shutil.copytree(runs / "fsdp2" / "checkpoints", kept.path)
    newest = kept.newest()
    shard = min(newest.glob("*.safetensors"))
    if harm == "flipped":
        content = bytearray(shard.read_bytes())
        content[-100] ^= 1
        shard.write_bytes(content)
    elif harm == "missing":
        shard.unlink()
    elif harm == "foreign":
        shutil.copy(shard, newest / "shard-00003-model-00001-of-00001.safetensors")
    else:
        (newest / "checkpoint.json").unlink()
    notes: list[object] = []
    assert kept.resumable(notes.append).name == f"step-{KEPT}"
    assert len(notes) == 1
    with pytest.raises(CheckpointError):
        read_checkpoint(newest)


@pytest.mark.parametrize(
    ("source", "parallel"), [("fsdp2", "fsdp2"), ("one", "fsdp2"), ("fsdp2", "ddp")]
)
def test_resumed_by_two_ranks_as_if_never_stopped(runs: Place, source: str, parallel: str) -> None:
    """By the same two ranks, by two what one process began, and by ranks of the other kind."""
    run = runs.stopped(source, f"{source} by {parallel}")
    runs.ranks(runs.arguments(run.name, "--resume", "--parallel", parallel))
    assert_same(run, runs / source)
    began = (0, source, 2) if source != "one" else (0, None, 1)
    assert processes(run) == [began, (KEPT, parallel, 2)]


@pytest.mark.parametrize("source", ["ddp", "fsdp2"])
def test_resumed_by_one_process_as_if_never_stopped(runs: Place, source: str) -> None:
    run = runs.stopped(source, f"{source} by one")
    runs.alone(runs.arguments(run.name, "--resume"))
    assert_same(run, runs / source)
    assert processes(run) == [(0, source, 2), (KEPT, None, 1)]


def test_killed_rank_ends_the_other_and_loses_no_checkpoint(runs: Place) -> None:
    path = runs / "killed"
    with started(runs.new("killed", "--steps", "1000000", "--parallel", "ddp")) as process:
        until(lambda: lines_of(path) > 3)
        rank_of(process.pid, 1).kill()
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode
    assert "Rank 0 of 2 lost touch with the others" in errors
    assert read_checkpoint(newest_checkpoint(path))[0]["step"] >= 2
    assert not [file for file in path.rglob("*") if "partial" in file.name]


def test_stopped_ranks_save_after_the_same_step(runs: Place) -> None:
    path = runs / "interrupted"
    endless = ["--steps", "1000000", "--checkpoint-every", "0", "--parallel", "fsdp2"]
    with started(runs.new("interrupted", *endless)) as process:
        until(lambda: lines_of(path) > 3)
        # One alone: the other must learn of it.
        rank_of(process.pid, 1).terminate()
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode
    made = lines_of(path)
    assert errors.count(f"Interrupted after {made} of 1000000 steps; continue with --resume.") == 1
    assert read_checkpoint(newest_checkpoint(path))[0]["step"] == made
    assert "exitcode  : 2" in errors


def test_ranks_that_disagree_say_so_once(runs: Place) -> None:
    """Refused by all before anything is written; torchrun shows the code of rank 0."""
    script = 'exec "$PYTHON" -m forge_harness "$0" "$@" --seed "$RANK" --parallel ddp'
    done = torchrun(runs.new("disagreeing"), script=script)
    assert done.returncode
    told = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert told == [
        "Error: Rank 1 has seed 1, and rank 0 has 0; start all ranks with one command, "
        "configuration and environment."
    ]
    assert "exitcode  : 4" in done.stderr
    assert "terminate called" not in done.stderr
    assert not (runs / "disagreeing").exists()


def test_only_the_rank_that_fails_is_named(runs: Place, tmp_path: Path) -> None:
    """Its configuration cannot be read; rank 0 could have gone on."""
    bad = tmp_path / "bad.toml"
    bad.write_text("[model]\nwidth = -1\n")
    script = (
        'test "$RANK" = 0 || set -- "$@" --config "$0"; '
        'exec "$PYTHON" -m forge_harness "$@" --parallel ddp'
    )
    done = torchrun([str(bad), *runs.new("half")], script=script)
    told = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert len(told) == 1
    assert told[0].startswith("Error: Rank 1 of 2: ")
    assert "model.width" in told[0]
    assert not (runs / "half").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--parallel", "ddp"], {}, "lacks RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (["--parallel", "fsdp2"], {"RANK": "0", "WORLD_SIZE": "2"}, "lacks MASTER_ADDR, MASTER_P"),
        ([], {"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE says that 2 ranks were started"),
        (["--device", "cuda"], {}, "--device cuda needs --parallel"),
    ],
)
def test_start_without_the_other_half_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    environment: dict[str, str],
    words: str,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = ["--task", "digits", "--out", str(tmp_path / "run"), *arguments]
    code = _run(lambda: train_command.main(out, standalone_mode=False))
    assert code == ExitCode.USAGE
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


ROUNDS = """
import sys
import torch
import torch.distributed as dist
from forge_harness.protocols import TrainOptions
from forge_harness.training import DistributedError, QATSession, reference_model
from forge_harness.training.parallel import DataParallelRanks, ShardedRanks, leave

def build(task, seed, precision):
    return reference_model(task, dist.get_rank(), precision)

def build_each_its_own():
    try:
        QATSession("digits", TrainOptions(), build_model=build, ranks=ShardedRanks())
    except DistributedError as error:
        assert "2 ranks hold 2 different models" in str(error)
    else:
        raise AssertionError("nobody noticed")

def train():
    ranks = DataParallelRanks()
    wrapped = ranks.wrap(torch.nn.Linear(8, 8))
    wrapped(torch.ones(2, 8)).sum().backward()
    ranks.gather(1.0)

torch.set_num_threads(1)
for index in range(10):
    place = f"file://{sys.argv[1]}/{index}"
    dist.init_process_group("gloo", init_method=place, rank=int(sys.argv[2]), world_size=2)
    train()
    if index == 0:
        build_each_its_own()
    leave()
"""


def test_ranks_part_without_waiting_for_ever(tmp_path: Path) -> None:
    """With the reducer last to let go of the group, one of the first three of ten rounds hung.

    In the first, ranks that build different models are told so: sharded, nobody else would.
    """
    environment = dict(os.environ)
    if name := loopback():
        environment["GLOO_SOCKET_IFNAME"] = name
    ranks = [
        subprocess.Popen([sys.executable, "-c", ROUNDS, str(tmp_path), rank], env=environment)
        for rank in "01"
    ]
    try:
        assert [rank.wait(timeout=TIMEOUT_S) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def rank_of(torchrun: int, rank: int) -> psutil.Process:
    children = psutil.Process(torchrun).children()
    return next(each for each in children if each.environ()["RANK"] == str(rank))


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
