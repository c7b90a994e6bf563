"""Tasks side by side in processes of their own: values, and every way not to have one."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from forge_harness.drill.workers import side_by_side

STATE = []


def work(task):
    what, value = task
    if what == "raise":
        raise ValueError(value)
    if what == "exit":
        sys.exit(value)
    if what == "vanish":
        os.write(1, b"the last words\n")
        os._exit(value)
    if what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang":
        time.sleep(60)
    if what == "options":
        return os.environ.get(value)
    if what == "temporary":
        return tempfile.mkdtemp()
    if what.endswith("and die"):
        pid = subprocess.Popen(["sleep", "60"]).pid if what.startswith("spawn") else os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        with open(value, "w") as out:
            out.write(str(pid))
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang with a child":
        child = subprocess.Popen(["sleep", "60"])
        with open(value, "w") as out:
            out.write(str(child.pid))
        time.sleep(60)
    STATE.append(value)
    return list(STATE)


def ends(tasks, jobs=2, timeout_s=30.0):
    found = side_by_side(work, tasks, jobs=jobs, timeout_s=timeout_s, preload=())
    return {one.index: one for one in found}


def test_values_come_back_and_no_task_sees_another():
    found = ends([("keep", i) for i in range(5)])
    assert [found[i].value for i in range(5)] == [[i] for i in range(5)]
    assert STATE == []
    assert not any(one.problem for one in found.values())


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        (("raise", "no such layer"), "ValueError: no such layer"),
        (("exit", 0), "SystemExit: 0"),
        (("vanish", 3), "status 3 (the last words)"),
        (("segfault", 0), "status -11"),
    ],
)
def test_a_task_without_a_value_says_why_and_the_next_one_runs(task, problem):
    found = ends([task, ("keep", 7)], jobs=1)
    assert found[0].value is None
    assert problem in found[0].problem
    assert found[1].value == [7]


def test_a_secret_in_the_last_words_is_masked():
    found = ends([("raise", "token=ghp_" + "a" * 36)])
    assert "a" * 36 not in found[0].problem


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def test_the_options_of_a_user_s_pytest_stay_outside(monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-n 2")
    assert ends([("options", "PYTEST_ADDOPTS")])[0].value is None


def test_temporary_files_go_with_the_drill():
    place = ends([("temporary", "")])[0].value
    assert "forge-drill-" in place
    assert not os.path.exists(place)


@pytest.mark.parametrize("how", ["spawn and die", "fork and die"])
def test_what_a_dead_task_started_is_ended_and_its_death_seen_at_once(tmp_path, how):
    started = time.monotonic()
    found = ends([(how, str(tmp_path / "pid"))], timeout_s=60.0)
    assert "status -9" in found[0].problem
    assert time.monotonic() - started < 30
    assert wait_until(lambda: gone((tmp_path / "pid").read_text()))


def test_a_task_that_hangs_is_ended_with_all_it_started(tmp_path):
    found = ends([("hang with a child", str(tmp_path / "pid")), ("keep", 1)], timeout_s=3.0)
    assert found[0].problem == "took longer than 3 s"
    assert found[1].value == [1]
    assert wait_until(lambda: gone((tmp_path / "pid").read_text()))


def test_leaving_early_ends_what_still_runs(tmp_path):
    running = side_by_side(
        work,
        [("keep", 1), ("hang with a child", str(tmp_path / "pid"))],
        jobs=2,
        timeout_s=60,
        preload=(),
    )
    next(running)
    assert wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    running.close()
    assert wait_until(lambda: gone((tmp_path / "pid").read_text()))


PARENT = """
import sys
from forge_harness.drill.workers import side_by_side
from tests.drill.test_workers import work
if __name__ == "__main__":
    tasks = [("hang with a child", sys.argv[1])]
    list(side_by_side(work, tasks, jobs=1, timeout_s=60, preload=()))
"""


def test_nothing_outlives_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    pid = tmp_path / "pid"
    with subprocess.Popen([sys.executable, script, pid], env=environment) as parent:
        assert wait_until(lambda: pid.exists() and pid.read_text(), 30.0)
        parent.kill()
    assert wait_until(lambda: gone(pid.read_text()))
