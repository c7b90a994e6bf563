"""What compares times runs last, and while the other workers of the session run nothing."""

from __future__ import annotations

import multiprocessing
import os
import time

from forge_harness._pytest import shared
from forge_harness._pytest.shared import alone, alongside

TIMED = """
import pytest
@pytest.mark.forge_timing
@pytest.mark.forge_check("mine.a", title="It", severity="high")
def test_1(evidence): evidence.record("x", 1)
@pytest.mark.forge_check("mine.b", title="It", severity="high")
def test_2(evidence): evidence.record("x", 1)
"""


def test_what_compares_times_runs_last(pytester):
    pytester.makepyfile(test_it=TIMED)
    result = pytester.runpytest_inprocess("-v", "-p", "no:cacheprovider", "test_it.py")
    ended = [line for line in result.outlines if "::" in line and "PASSED" in line]
    assert ["::test_2" in ended[0], "::test_1" in ended[1]] == [True, True], result.outlines


BUSY = """
import time
from pathlib import Path
import pytest

@pytest.fixture(autouse=True)
def seen(request):
    begin = time.monotonic()
    yield
    line = f"{{request.node.name}} {{begin}} {{time.monotonic()}}\\n"
    with Path({seen!r}).open("a") as file:
        file.write(line)

@pytest.mark.parametrize("n", range(12))
def test_other(n):
    time.sleep(0.1)

@pytest.mark.forge_timing
@pytest.mark.parametrize("n", range(3))
def test_timed(n):
    time.sleep(0.2)

@pytest.mark.parametrize("n", range(12))
def test_later(n):
    time.sleep(0.1)
"""


def test_the_other_workers_run_nothing_meanwhile(pytester):
    """Of tests that are no checks as well: these here use it."""
    seen = pytester.path / "seen.txt"
    pytester.makepyfile(test_it=BUSY.format(seen=str(seen)))
    result = pytester.runpytest_subprocess("-n", "3", "--dist", "worksteal", "test_it.py")
    assert result.parseoutcomes()["passed"] == 27
    rows = [line.split() for line in seen.read_text(encoding="utf-8").splitlines()]
    spans = [(name, float(begin), float(end)) for name, begin, end in rows]
    timed = [span for span in spans if span[0].startswith("test_timed")]
    overlaps = [
        (one[0], other[0])
        for one in timed
        for other in spans
        if one is not other and one[1] < other[2] and other[1] < one[2]
    ]
    assert (len(timed), overlaps) == (3, [])
    others = [span for span in spans if not span[0].startswith("test_timed")]
    assert any(
        one[1] < other[2] and other[1] < one[2]
        for one in others
        for other in others
        if one is not other
    ), "the others run beside each other"


def in_and_out(directory, ready, stop):
    while not stop.is_set():
        with alongside(directory):
            ready.set()
            time.sleep(0.05)


def test_a_stream_of_others_does_not_keep_it_out(tmp_path):
    context = multiprocessing.get_context("fork")
    stop, begun = context.Event(), [context.Event() for _ in range(4)]
    processes = [
        context.Process(target=in_and_out, args=(tmp_path, ready, stop)) for ready in begun
    ]
    for process in processes:
        process.start()
    try:
        assert all(ready.wait(20) for ready in begun)
        start = time.monotonic()
        for _ in range(5):
            with alone(tmp_path):
                pass
        # Each waits for at most one block of each of the others: 0.05 s.
        assert time.monotonic() - start < 5
    finally:
        stop.set()
        for process in processes:
            process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4


def test_others_that_never_end_are_not_waited_for(tmp_path, monkeypatch):
    """They may wait for what a test behind this one holds, such as a lock of the user's own."""
    monkeypatch.setattr(shared, "PATIENCE_S", 0.2)
    context = multiprocessing.get_context("fork")
    begun, stop = context.Event(), context.Event()

    def stay():
        with alongside(tmp_path):
            begun.set()
            stop.wait(60)

    process = context.Process(target=stay)
    process.start()
    try:
        assert begun.wait(20)
        start = time.monotonic()
        with alone(tmp_path):
            assert 0.2 <= time.monotonic() - start < 20
    finally:
        stop.set()
        process.join(20)
    assert process.exitcode == 0


def test_a_child_left_behind_does_not_hold_it(tmp_path):
    context = multiprocessing.get_context("fork")
    with alongside(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)

    def enter():
        with alone(tmp_path):
            pass

    try:
        process = context.Process(target=enter)
        process.start()
        process.join(10)
        assert process.exitcode == 0
    finally:
        process.kill()
        os.kill(child, 9)
        os.waitpid(child, 0)
