"""Stop signals: the first ends a block that says so, in any other they wait for nothing."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from forge_harness.integration.stops import (
    STOPS,
    delayed,
    interrupted_like_sigint,
    interrupted_once,
    uninterrupted,
)


@pytest.fixture(autouse=True)
def handlers():
    """A signal that is not handled would end pytest itself."""

    def fail(number, frame):
        raise AssertionError(f"{signal.Signals(number).name} reached the handler from before")

    before = {number: signal.signal(number, fail) for number in STOPS}
    yield fail
    for number, previous in before.items():
        signal.signal(number, previous)


def stop(number):
    os.kill(os.getpid(), number)


def test_the_signals_are_those_of_a_user_a_scheduler_and_a_terminal():
    assert set(STOPS) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("later", STOPS)
def test_the_first_signal_interrupts_and_later_ones_leave_the_clean_up_alone(number, later):
    cleaned = []

    def work():
        with interrupted_once():
            try:
                stop(number)
            finally:
                stop(later)
                cleaned.append(later)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert cleaned == [later]


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("fails", [False, True])
def test_a_delayed_signal_comes_at_the_end_of_the_block(number, fails):
    done = []

    def work():
        with interrupted_once(), delayed():
            stop(number)
            stop(number)
            done.append(number)
            if fails:
                raise ValueError("of the block itself")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [number]


def test_without_a_signal_nothing_comes():
    with interrupted_once(), delayed():
        pass


class Stopped:
    """What is stopped while it is being freed, where Python ignores whatever is raised."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        stop(self.number)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_in_a_destructor_interrupts_all_the_same(number):
    """It was lost, and all later ones did nothing: only a kill ended the process."""
    reached = []

    def work():
        with interrupted_once():
            thing = Stopped(number)
            del thing
            reached.append("after it")
            time.sleep(10)
            reached.append("the end")

    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["after it"]
    assert sys.unraisablehook is hook


def test_a_signal_in_a_destructor_at_the_end_is_not_left_to_the_handlers_from_before():
    def work():
        with interrupted_once():
            thing = Stopped(signal.SIGTERM)
            del thing

    work()
    time.sleep(0.05)


@pytest.mark.parametrize("number", STOPS)
def test_nothing_interrupts_a_block_that_must_end(number):
    reached = []
    with uninterrupted():
        stop(number)
        reached.append("inside")
        with pytest.raises(KeyboardInterrupt), interrupted_once():
            stop(number)
        stop(number)
        reached.append("after an interrupted block in it")
    assert len(reached) == 2


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_before_a_block_that_it_would_end_is_not_lost(number):
    """A run that was stopped while it made its directory went on to its end."""
    reached = []
    with uninterrupted():
        stop(number)
        reached.append("made the directory")
        with pytest.raises(KeyboardInterrupt), uninterrupted(), interrupted_once():
            reached.append("ran the checks")
        with interrupted_once():
            reached.append("once is enough")
    assert reached == ["made the directory", "once is enough"]


@pytest.mark.parametrize("block", [interrupted_once, uninterrupted])
def test_the_handlers_from_before_come_back(block, handlers):
    with block():
        assert all(signal.getsignal(number) is not handlers for number in STOPS)
    assert all(signal.getsignal(number) is handlers for number in STOPS)


@pytest.mark.parametrize("block", [interrupted_once, uninterrupted])
def test_a_signal_that_is_ignored_stays_ignored(block):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with block():
        stop(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_child_process_does_not_inherit_that_signals_do_nothing():
    with uninterrupted():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == -signal.SIGTERM


@pytest.mark.parametrize("block", [interrupted_once, uninterrupted])
def test_another_thread_sets_no_handlers(block, handlers):
    seen = []

    def enter():
        with block():
            seen.extend(signal.getsignal(number) for number in STOPS)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [handlers] * len(STOPS)


def ended_by(code):
    """What ends a process of its own that runs `code`: its exit code, and what it said."""
    head = (
        "import os, signal\nfrom forge_harness.integration.stops import interrupted_like_sigint\n"
    )
    head += "stop = lambda number: os.kill(os.getpid(), number)\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code],
        capture_output=True,
        text=True,
        check=False,
        # Of a parent that ignores it, as nohup does, a child inherits that.
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in STOPS],
    )
    return done.returncode, done.stdout


INTERRUPTED = """
try:
    with interrupted_like_sigint():
        try:
            stop(signal.{first})
            print("went on")
        finally:
            print("cleaned", flush=True)
            {then}
except KeyboardInterrupt:
    print("interrupted", flush=True)
stop(signal.SIGTERM)
"""


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_nobody_handles_interrupts_and_ends_the_process_afterwards(first):
    code = INTERRUPTED.format(first=first, then="pass")
    assert ended_by(code) == (-signal.SIGTERM, "cleaned\ninterrupted\n")


@pytest.mark.parametrize("first", ["SIGTERM", "SIGHUP"])
def test_a_second_signal_ends_the_process_at_once(first):
    code = INTERRUPTED.format(first=first, then="stop(signal.SIGHUP); print('went on')")
    assert ended_by(code) == (-signal.SIGHUP, "cleaned\n")


def test_a_child_of_fork_ends_as_if_nothing_were_handled():
    code = """
with interrupted_like_sigint():
    if (child := os.fork()) == 0:
        try:
            stop(signal.SIGTERM)
        finally:
            os._exit(5)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert ended_by(code) == (0, f"{-signal.SIGTERM}\n")


def test_a_signal_that_somebody_handles_or_ignores_is_left_to_them(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interrupted_like_sigint():
        assert signal.getsignal(signal.SIGTERM) is handlers
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is handlers
