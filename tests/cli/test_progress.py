"""Progress: plain lines where nobody watches, a bar where someone does."""

import io
import sys

import pytest

from forge_harness.cli.progress import PlainProgress, progress_of
from forge_harness.integration.pipeline_validator import Progress
from forge_harness.types import Outcome


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def step(done, total, label="data.alpha", outcome="pass", stage="checks"):
    return Progress(
        stage=stage,
        done=done,
        total=total,
        label=label,
        outcome=None if outcome is None else Outcome(outcome),
    )


def test_plain_lines_start_end_failures_and_every_ten_seconds(capsys):
    clock = Clock()
    progress = PlainProgress(clock)
    for done in range(1, 101):
        clock.now += 0.5
        progress(step(done, 100, outcome="fail" if done == 50 else "pass"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "checks 1/100 (1 pass)"
    assert lines[-1] == "checks 100/100 (99 pass, 1 fail)"
    assert "  fail: data.alpha" in lines
    assert 6 <= len(lines) <= 9


def test_a_training_stage_names_the_run(capsys):
    PlainProgress(Clock())(step(1, 6, label="digits ternary 0", outcome=None, stage="study"))
    assert capsys.readouterr().err == "training 1/6 (digits ternary 0)\n"


def test_quiet_shows_nothing():
    with progress_of(quiet=True) as progress:
        assert progress is None


@pytest.mark.parametrize("variable", ["NO_COLOR", None])
def test_a_terminal_gets_a_bar_unless_it_says_no(monkeypatch, variable):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    if variable:
        monkeypatch.setenv(variable, "1")
    with progress_of(quiet=False) as progress:
        progress(step(1, 2, label="[red]x", outcome=None, stage="study"))
        progress(step(1, 2, outcome="error"))
        progress(step(2, 2))
    assert isinstance(progress, PlainProgress) is (variable is not None)
    assert ("\x1b[" in stream.getvalue()) is (variable is None)
    assert "error: data.alpha" in stream.getvalue()
    assert "2/2" in stream.getvalue()
