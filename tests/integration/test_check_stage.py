"""The process that runs the checks, played by scripts: what it tells, and how it ends."""

from __future__ import annotations

import json
import sys
import time

import pytest

from forge_harness.integration import check_stage
from forge_harness.integration.check_stage import CheckStage
from forge_harness.types import Outcome

MARK = {"title": None, "severity": None, "component": "user", "problem": None, "dropped": False}
NAMES = ("t.py::a", "t.py::b", "t.py::c")


def item(nodeid):
    return {
        "nodeid": nodeid,
        "check": "mine.x",
        "outcome": "pass",
        "reason": "",
        "duration_s": 0.1,
    }


COLLECTED = {"event": "collected", "marks": {n: {"check": "mine.x", **MARK} for n in NAMES}}
STARTED = [{"event": "started", "nodeid": nodeid} for nodeid in NAMES]
ENDED = [{"event": "item", "record": item(nodeid)} for nodeid in NAMES]
FINISHED = {"event": "finished", "exitstatus": 0, "error": None, "lost": 0, "reason": ""}


@pytest.fixture
def stage(tmp_path):
    """Makes a stage whose process writes the events given, then runs a script."""
    items = []

    def make(events, script="", **options):
        text = "".join(json.dumps(event) + "\n" for event in events)
        program = f"open({str(tmp_path / 'events')!r}, 'w').write({text!r})\n{script}"
        defaults = {"deadline": None, "stop": lambda: None, "on_item": items.append}
        return CheckStage(
            command=[sys.executable, "-c", program],
            events=tmp_path / "events",
            log=tmp_path / "log",
            limits={"mine.x": 60.0},
            **{**defaults, **options},
        )

    make.items = items
    make.events = tmp_path / "events"
    return make


def found(stage):
    return {record.nodeid[-1]: (record.outcome, record.reason) for record in stage.items}


def test_a_whole_run_has_no_problem(stage):
    assert stage([COLLECTED, *STARTED, *ENDED, FINISHED]).run().problem == ""
    assert {outcome for outcome, _ in found(stage).values()} == {Outcome.PASS}
    assert len(stage.items) == 3


@pytest.mark.parametrize(
    ("events", "script", "problem"),
    [
        ([COLLECTED, STARTED[0], ENDED[0]], "exit(0)", "ended early (exit status 0)"),
        (
            [COLLECTED, STARTED[0], ENDED[0]],
            "print('Killed'); import os; os.kill(os.getpid(), 9)",
            "ended early (killed by SIGKILL, often for memory)",
        ),
        ([COLLECTED, STARTED[0], ENDED[0], FINISHED], "", "were never reported"),
        (
            [COLLECTED, STARTED[0], ENDED[0], {**FINISHED, "error": "KeyError: 3"}],
            "",
            "pytest broke down: KeyError: 3",
        ),
        (
            [COLLECTED, STARTED[0], ENDED[0], FINISHED],
            "print('INTERNALERROR> gevent LoopExit')",
            "pytest broke down: INTERNALERROR in a worker",
        ),
    ],
    ids=["silent_exit", "killed", "lost", "broke_down", "worker_broke_down"],
)
def test_what_never_ended_is_not_measured(stage, events, script, problem):
    end = stage(events, script).run()
    assert problem in end.problem
    outcomes = {name: outcome for name, (outcome, _) in found(stage).items()}
    lost = Outcome.NOT_MEASURED
    assert outcomes == {"a": Outcome.PASS, "b": lost, "c": lost}
    assert len(stage.items) == 3, "each item is told once"


def test_the_end_of_the_runs_time_is_an_error_of_what_runs(stage):
    running = stage([COLLECTED, STARTED[0], STARTED[1], ENDED[0]], "import time; time.sleep(600)")

    def on_item(record):
        stage.items.append(record)
        running.deadline = time.monotonic()

    running.on_item = running.reader.on_item = on_item
    assert running.run().problem == "the run's time was up before this check ended"
    ended = found(stage)
    assert ended["a"][0] is Outcome.PASS
    assert ended["b"][0] is Outcome.ERROR
    assert "timed out: running for" in ended["b"][1]
    assert ended["c"] == (Outcome.NOT_MEASURED, "the run's time was up before this check ended")


@pytest.mark.parametrize(
    "events", [[], [COLLECTED, *STARTED, *ENDED]], ids=["collecting", "ending"]
)
def test_a_process_that_does_nothing_is_ended(stage, monkeypatch, request, events):
    monkeypatch.setattr(check_stage, "STALL_S", 0.5)
    doing = request.node.callspec.id
    problem = stage(events, "import time; time.sleep(600)").run().problem
    assert problem == f"pytest hung while {doing}: nothing happened for 0.5 s"


def test_a_test_without_a_limit_has_one(stage, monkeypatch):
    monkeypatch.setattr(check_stage, "DEFAULT_LIMIT_S", 0.1)
    monkeypatch.setattr(check_stage, "HANG_GRACE_S", 0.1)
    other = {"event": "started", "nodeid": "t.py::no_check"}
    problem = stage([COLLECTED, other], "import time; time.sleep(600)").run().problem
    assert problem == "t.py::no_check hung and was ended together with the run"


def test_half_a_line_waits_for_its_end(stage, tmp_path):
    script = (
        "import time\n"
        f"stream = open({str(tmp_path / 'events')!r}, 'a')\n"
        f"line = {json.dumps(ENDED[1])!r} + chr(10)\n"
        "for part in (line[:30], line[30:]):\n"
        "    stream.write(part); stream.flush(); time.sleep(0.3)\n"
        f"stream.write({json.dumps(ENDED[2])!r} + chr(10) + {json.dumps(FINISHED)!r} + chr(10))\n"
    )
    assert stage([COLLECTED, *STARTED, ENDED[0]], script).run().problem == ""
    assert len(stage.items) == 3


def test_nothing_collected_shows_the_last_line(stage):
    end = stage([FINISHED], "print('ERROR: not a directory'); exit(4)").run()
    assert end.problem == "no check was collected (exit status 4): ERROR: not a directory"


def test_a_reason_to_stop_ends_the_process(stage):
    running = stage([COLLECTED, *STARTED[:1]], "import time; time.sleep(600)", stop=lambda: "full")
    assert running.run().problem == "full"
    assert {reason for _, reason in found(stage).values()} <= {"full"}


def test_output_does_not_block_the_process(stage, tmp_path):
    # More than a pipe holds.
    script = "print('x' * 1_000_000)"
    assert stage([COLLECTED, *STARTED, *ENDED, FINISHED], script).run().problem == ""
    assert (tmp_path / "log").stat().st_size == 1_000_001


def test_a_test_that_is_no_check_is_over_when_it_has_ended(stage, monkeypatch):
    monkeypatch.setattr(check_stage, "DEFAULT_LIMIT_S", 0.1)
    monkeypatch.setattr(check_stage, "HANG_GRACE_S", 0.1)
    plain = [{"event": kind, "nodeid": "t.py::no_check"} for kind in ("started", "ended")]
    script = f"""import time; time.sleep(1)
open({str(stage.events)!r}, 'a').write({json.dumps(FINISHED)!r} + chr(10))"""
    assert stage([COLLECTED, *plain, *ENDED], script).run().problem == ""


def test_a_limit_of_the_tests_own_counts_instead_of_the_catalogues(stage, monkeypatch):
    monkeypatch.setattr(check_stage, "HANG_GRACE_S", 0.1)
    limits = {"t.py::a": 30.0, "t.py::b": 0.1}
    marks = {n: {"check": "mine.x", **MARK, "timeout_s": s} for n, s in limits.items()}
    started = [{"event": "started", "nodeid": nodeid} for nodeid in limits]
    collected = {"event": "collected", "marks": marks}
    running = stage([collected, *started], "import time; time.sleep(600)")
    running.limits = {"mine.x": 0.0}
    assert running.run().problem == "t.py::b hung and was ended together with the run"
    assert found(stage)["a"][0] is Outcome.NOT_MEASURED
