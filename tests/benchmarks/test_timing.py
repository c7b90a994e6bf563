"""Interleaved timing: what it counts, and that a ratio of the same call is one."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from forge_harness.benchmarks import timing
from forge_harness.benchmarks.timing import Timed, in_one_thread, interleave, speedup, void_of


def test_candidates_take_turns_in_rotating_order():
    seen = []
    found = interleave(
        {name: lambda name=name: seen.append(name) for name in "abc"}, rounds=6, batch=0.0
    )
    # Calibration calls come first; then one call a batch.
    turns = seen[-18:]
    assert turns == list("abcbcacab" * 2)
    assert all(len(t.seconds) == len(t.disturbed) == 6 for t in found.values())


def test_a_ratio_is_of_paired_rounds():
    fast = Timed("fast", 1, [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 8.0, 1.0], [False] * 8)
    slow = Timed("slow", 1, [3.0, 6.0, 12.0, 3.0, 6.0, 12.0, 24.0, 3.0], [False] * 8)
    # Whatever the machine did in a round, it did to both.
    found = speedup(fast, slow)
    assert found.estimate == pytest.approx(3.0)
    assert (found.low, found.high) == (3.0, 3.0)


def test_disturbed_rounds_are_left_out_while_enough_stay():
    fast = Timed("fast", 1, [1.0] * 6 + [100.0] * 2, [False] * 6 + [True] * 2)
    slow = Timed("slow", 1, [2.0] * 8, [False] * 8)
    assert speedup(fast, slow).estimate == 2.0
    assert fast.median == 1.0
    assert Timed("few", 1, [1.0, 9.0, 9.0], [False, True, True]).median == 9.0


def test_figures_of_disturbed_rounds_are_void():
    def each(undisturbed):
        return Timed("", 1, [1.0] * 9, [False] * undisturbed + [True] * (9 - undisturbed))

    timed = {"quiet": each(9), "some": each(6), "few": each(5), "fewest": each(2)}
    ratios = [("quiet", name) for name in timed] + [("fewest", "quiet")]
    assert void_of(timed, ratios) == [
        "fewest",
        "quiet / few",
        "quiet / fewest",
        "fewest / quiet",
    ]


@pytest.mark.parametrize(
    ("waits", "disturbed"),
    [
        (lambda i: {"7": 1000 * i}, False),  # a microsecond of each batch
        (lambda i: {"7": 10**6 * i}, True),  # a millisecond
        (lambda i: {"7": 0, str(i): 10**6}, True),  # of a thread that began in it
        (lambda i: {str(i): 0}, False),
    ],
)
def test_a_batch_whose_threads_waited_is_disturbed(monkeypatch, waits, disturbed):
    readings = iter(range(100))
    monkeypatch.setattr(timing, "waits_of_threads", lambda: waits(next(readings)))
    found = interleave({"a": lambda: time.sleep(0.02)}, rounds=6, batch=0.0)["a"]
    assert found.disturbed == [disturbed] * 6


@pytest.mark.parametrize(("switches", "disturbed"), [(0, False), (1, True)])
def test_without_a_count_of_waits_a_switch_disturbs(monkeypatch, switches, disturbed):
    readings = iter(range(100))
    monkeypatch.setattr(timing, "waits_of_threads", lambda: None)
    monkeypatch.setattr(
        timing.resource,
        "getrusage",
        lambda _: SimpleNamespace(ru_nivcsw=switches * next(readings)),
    )
    found = interleave({"a": lambda: time.sleep(0.001)}, rounds=6, batch=0.0)["a"]
    assert found.disturbed == [disturbed] * 6


def test_too_few_rounds_give_no_ratio():
    one = Timed("one", 1, [1.0] * 5, [False] * 5)
    assert speedup(one, one) is None


def test_the_processor_time_of_all_threads_is_counted():
    used = []

    def work():
        start = time.thread_time()
        hashlib.sha256(bytes(1 << 20))
        used.append(time.thread_time() - start)

    def call():
        list(pool.map(lambda _: work(), range(2)))

    with ThreadPoolExecutor(2) as pool:
        found = interleave({"both": call}, rounds=6, batch=0.0)["both"]
    assert found.calls == 1
    assert sum(found.processor) >= sum(used[-2 * 6 :])


def test_in_one_thread_work_of_all_counts_and_so_does_waiting():
    timed = Timed("", 1, [1.0, 3.0], [False] * 2, processor=[2.0, 0.5])
    assert in_one_thread(timed).seconds == [2.0, 3.0]
    assert timed.seconds == [1.0, 3.0]
