"""What threads waited for a core is what the system counted, and of threads that began since."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from forge_harness.probes.waiting import waited, waits_of_threads

COUNTS = pytest.mark.skipif(
    waits_of_threads() is None, reason="This system keeps no count of the time threads wait."
)


def written(directory, **threads):
    for name, text in threads.items():
        (directory / name[1:]).mkdir()
        (directory / name[1:] / "schedstat").write_text(text, encoding="ascii")
    return directory


def test_the_second_number_of_each_thread_counts(tmp_path):
    tasks = written(tmp_path, _7="900 25 3\n", _8="1 0 0\n")
    (tmp_path / "9").mkdir()  # ended since it was listed
    assert waits_of_threads(tasks) == {"7": 25, "8": 0}


@pytest.mark.parametrize("text", ["", "900\n", "900 many 3\n", "0 0 0\n"])
def test_other_files_are_no_count(tmp_path, text):
    assert waits_of_threads(written(tmp_path, _7=text)) is None


def test_a_system_without_them_has_no_count(tmp_path):
    assert waits_of_threads(tmp_path / "none") is None
    (tmp_path / "7").mkdir()
    assert waits_of_threads(tmp_path) is None


def test_threads_that_began_since_count_from_their_beginning():
    assert waited({"7": 100, "8": 5}, {"7": 130, "9": 4}) == 34


@COUNTS
def test_each_thread_is_counted():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert {str(os.getpid()), str(thread.native_id)} <= set(waits_of_threads())
    finally:
        stop.set()
        thread.join()


@COUNTS
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Needs processor affinity.")
def test_two_processes_on_one_core_wait_for_each_other():
    """In a process of its own, as the affinity of this one is the other tests' as well."""
    source = """
import os, subprocess, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from forge_harness.probes.waiting import waited, waits_of_threads
other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
try:
    before, end = waits_of_threads(), time.monotonic() + 1
    while time.monotonic() < end: pass
    print(waited(before, waits_of_threads()))
finally:
    other.kill()
    other.wait()
"""
    found = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=True
    )
    # Half of a second; less where the other process is slow to begin.
    assert 1e8 < int(found.stdout) < 1.01e9
