from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from forge_harness.training import (
    QATSession,
    TrainingInterrupted,
    newest_checkpoint,
    train_to_directory,
)
from forge_harness.training.checkpoint import read_checkpoint
from forge_harness.training.keeping import DirectoryCheckpoints
from forge_harness.training.run_directory import TrainingDirectory

from .runs import OPTIONS, interrupt_at, lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_leaves_a_checkpoint_that_resumes_bit_for_bit(
    tmp_path: Path, number: signal.Signals
) -> None:
    train_to_directory("digits", tmp_path / "through", OPTIONS)
    out = tmp_path / "out"
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match="Interrupted after 3 of 6 steps") as caught:
        train_to_directory("digits", out, OPTIONS, on_step=interrupt_at(2, number))
    assert caught.value.exit_code == 2
    assert signal.getsignal(number) == before
    assert not (out / "metrics.json").exists()
    with (out / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "of": "a step the checkpoint does not have"}\n')
    task, options = TrainingDirectory(out).options()
    train_to_directory(task, out, options, resume=True)
    untimed = [{**row, "seconds": 0} for row in lines(out)]
    assert untimed == [{**row, "seconds": 0} for row in lines(tmp_path / "through")]
    _, ours = read_checkpoint(newest_checkpoint(out))
    _, theirs = read_checkpoint(newest_checkpoint(tmp_path / "through"))
    assert all(torch.equal(ours[k].nan_to_num(), theirs[k].nan_to_num()) for k in theirs)


def test_signal_while_the_last_checkpoint_is_written_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = DirectoryCheckpoints.save

    def signalled(self: DirectoryCheckpoints, session: QATSession) -> None:
        save(self, session)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(DirectoryCheckpoints, "save", signalled)
        with pytest.raises(TrainingInterrupted, match="after 6 of 6 steps"):
            train_to_directory("digits", tmp_path / "run", OPTIONS)
    assert not (tmp_path / "run/metrics.json").exists()
    assert train_to_directory("digits", tmp_path / "run", OPTIONS, resume=True)["steps"] == 6


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train_to_directory(
            "digits", tmp_path / "run", OPTIONS, on_step=interrupt_at(2, signal.SIGHUP)
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(lines(tmp_path / "run")) == 6
