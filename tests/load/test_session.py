"""The generator as a process: it starts, runs one plan after another, and is gone afterwards."""

import os
import signal
import subprocess
import threading

import psutil
import pytest

from forge_harness.errors import GeneratorError, LoadError
from forge_harness.load.analysis import analyse
from forge_harness.load.session import Generator, child_environment, locust_command

from . import support


def test_one_generator_runs_plan_after_plan(generator, tmp_path):
    steps = []
    with support.serving() as url:
        plan = support.plan_of(url, 60, ((1, 0.8), (2, 0.8)))
        for name in ("first", "second"):
            generator.run(plan, tmp_path / name, steps.append)
    counts = [analyse(tmp_path / name).reconciliation for name in ("first", "second")]
    # Locust counts on; each run is told what is its own.
    assert counts[0].locust == counts[1].locust == (counts[0].scheduled, 0)
    assert {step.phase for step in steps} == {"1x", "2x"}
    assert {step.scheduled for step in steps} == {counts[0].scheduled}


def test_nothing_is_started_for_an_address_that_does_not_answer(generator, tmp_path):
    with pytest.raises(LoadError, match="Nothing answers"):
        generator.run(support.plan_of(), tmp_path)
    assert not (tmp_path / "records-0.jsonl").exists()


def test_a_generator_that_is_killed_is_said_and_its_requests_are_missing(tmp_path):
    with support.serving() as url, Generator(tmp_path / "log") as own:
        plan = support.plan_of(url, 60, ((1, 4),))
        killer = threading.Timer(1.5, os.kill, (own.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(GeneratorError, match=r"ended with status -9.*log"):
            own.run(plan, tmp_path)
        killer.join()
    report = analyse(tmp_path)
    assert report.verdict == "INVALID"
    assert report.reconciliation.counts["censored"] > 50
    assert report.reconciliation.missing > 50


def test_no_process_is_left_behind(tmp_path):
    with Generator(tmp_path / "log") as own:
        pid = own.pid
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)


@pytest.mark.timeout(30)
def test_a_generator_that_hangs_is_ended_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("forge_harness.load.session._END_S", 0.3)
    with Generator(tmp_path / "log") as own:
        pid = own.pid
        os.kill(pid, signal.SIGSTOP)
    assert not psutil.pid_exists(pid)


def test_a_plan_it_cannot_run_is_said_in_its_words(generator, tmp_path):
    file = tmp_path / "none.jsonl"
    file.write_text("\n")
    with support.serving() as url:
        plan = support.plan_of(url, requests=str(file))
        with pytest.raises(GeneratorError, match=r"LoadError: The request file .*no request"):
            generator.run(plan, tmp_path / "run")


def test_a_server_that_does_not_outlive_the_load_fails_and_is_not_compared(generator, tmp_path):
    with support.serving("--exit-at", 1) as url:
        plan = support.plan_of(url, 100, ((1, 2),), slo_s=10.0)
        generator.run(plan, tmp_path)
    assert (tmp_path / "server-before.prom").exists()
    assert not (tmp_path / "server-after.prom").exists()
    report = analyse(tmp_path)
    assert (report.problems, report.verdict) == ((), "FAIL")
    assert "server's counters could not be read at the end" in report.reconciliation.server_text


def test_a_generator_whose_plan_is_stopped_ends_at_once_and_leaves_its_records(tmp_path):
    with support.serving() as url:
        plan = support.plan_of(url, 60, ((1, 60),))
        with pytest.raises(KeyboardInterrupt), Generator(tmp_path / "log") as own:
            own.run(plan, tmp_path, interrupts_after(30))
    books = analyse(tmp_path).reconciliation
    assert "the run was stopped at " in books.problems[0]
    assert books.problems[0].endswith(" s of 60 s")
    assert (books.missing, books.duplicated) == (0, 0)
    assert books.counts["ok"] >= 20
    assert books.locust == (books.ended, 0)


@pytest.mark.timeout(60)
def test_a_generator_whose_parent_is_gone_before_it_is_ready_ends(tmp_path):
    process = subprocess.Popen(
        [*locust_command(), "--headless", "-u", "1", "-r", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**child_environment(), "FORGE_LOAD_SESSION": "1"},
        cwd=tmp_path,
    )
    try:
        process.stdin.close()
        process.stdout.close()
        process.wait(40)
    finally:
        process.kill()
        process.wait()


def test_a_configuration_of_locust_at_home_is_for_locust_by_hand(tmp_path, monkeypatch):
    """With a run-time of its own it ended in the middle of the plan."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".locust.conf").write_text("run-time = 1s\n")
    with support.serving() as url, Generator(tmp_path / "run" / "log") as own:
        own.run(support.plan_of(url, 40, ((1, 2.5),)), tmp_path / "run")
    books = analyse(tmp_path / "run").reconciliation
    assert books.counts["ok"] == books.scheduled


def interrupts_after(count):
    def step(told):
        if told.sent > count:
            raise KeyboardInterrupt

    return step


def test_what_would_change_locust_or_slow_it_is_kept_from_it():
    given = {"LOCUST_USERS": "9", "COVERAGE_PROCESS_START": "x", "COV_CORE_SOURCE": "x", "A": "b"}
    assert child_environment(given) == {"A": "b"}
