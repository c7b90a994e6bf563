"""train: one process a directory, and what cannot be trained into is a usage error."""

import fcntl
import os
import subprocess
import sys

import pytest

from forge_harness.errors import ExitCode

TRAIN = ("train", "--task", "digits", "--steps", "60", "--out")


def test_two_at_once_are_one_run_and_one_refusal(tmp_path):
    command = [sys.executable, "-m", "forge_harness", *TRAIN, str(tmp_path / "out")]
    both = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=240)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [ExitCode.PASS, ExitCode.USAGE], said
    refused = said[codes.index(ExitCode.USAGE)]
    assert len(refused.splitlines()) == 1
    assert refused.startswith("Error: ")
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 60


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_another_process_trains_into_is_refused(invoke, tmp_path, resume):
    out = tmp_path / "out"
    out.mkdir()
    if resume:
        assert invoke(*TRAIN, out).exit_code == ExitCode.PASS
    held = os.open(out, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        result = invoke("train", "--resume", "--out", out) if resume else invoke(*TRAIN, out)
    finally:
        os.close(held)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert "Another process is training into" in result.stderr


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("file.txt", "file.txt' is a file; give a new directory."),
        ("file.txt/deeper", "Cannot train into"),
        ("x" * 300, "Cannot train into"),
        ("full", "is not empty; give a new directory"),
    ],
)
def test_what_cannot_be_trained_into_is_one_sentence_and_4(invoke, tmp_path, out, sentence):
    (tmp_path / "file.txt").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    result = invoke(*TRAIN, tmp_path / out)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (tmp_path / "file.txt").read_text() == "kept"


@pytest.mark.parametrize("key", ["heads", "context"])
def test_a_size_that_the_model_of_the_task_lacks_is_refused_not_ignored(invoke, tmp_path, key):
    config = tmp_path / "forge.toml"
    config.write_text(f"[model]\n{key} = 2\n")
    result = invoke(*TRAIN, tmp_path / "out", "--config", config)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert result.stderr.startswith(f"Error: model.{key} is 2 in {config}; the model of task 'di")
    config.write_text(f"[model]\n{key} = 1\n")
    assert invoke(*TRAIN, tmp_path / "out", "--config", config).exit_code == ExitCode.PASS


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_is_4(invoke, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o555)
    assert invoke(*TRAIN, tmp_path / "shut").exit_code == ExitCode.USAGE
    assert invoke(*TRAIN, tmp_path / "shut" / "deeper").exit_code == ExitCode.USAGE


def test_what_was_made_for_a_refused_run_is_not_left(invoke, tmp_path):
    result = invoke(*TRAIN, tmp_path / "out", "--from-checkpoint", tmp_path / "none")
    assert result.exit_code == ExitCode.USAGE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_stop_outside_of_the_steps_is_an_interruption_too(tmp_path, number):
    """While quality is measured: the default of these signals is to die without a word."""
    code = (
        "import os, signal, sys; from forge_harness.training import session\n"
        f"session.QATSession.evaluate = lambda self: os.kill(os.getpid(), signal.{number})\n"
        "from forge_harness.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *TRAIN[:-2], "2", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.INTERRUPTED, done.stderr
    assert done.stderr.endswith("Interrupted.\n")
    assert (tmp_path / "out" / "checkpoints" / "step-2.safetensors").exists()
