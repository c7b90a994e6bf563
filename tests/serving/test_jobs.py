import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.serving.jobs import Inbox, Job, StaleError


def job(cost=1):
    return Job("work", cost, 1, 0.0, None)


@given(
    costs=st.lists(st.integers(1, 9), max_size=30),
    room=st.integers(1, 12),
    gone=st.sets(st.integers(0, 29)),
)
def test_what_is_taken_is_in_order_fits_and_leaves_nothing_out(costs, room, gone):
    inbox = Inbox()
    generation, _ = inbox.successor()
    jobs = [job(cost) for cost in costs]
    for each in jobs:
        inbox.put(each)
    assert inbox.waiting_cost == sum(costs)
    discarded = [each for n, each in enumerate(jobs) if n in gone]
    assert all(map(inbox.discard, discarded))
    assert not any(map(inbox.discard, discarded))
    seen = []
    while batch := inbox.take(generation, room=room, by_cost=True):
        cost = sum(each.cost for each in batch)
        assert cost <= room or len(batch) == 1
        # No batch stops short of a job that would have fitted.
        following = next((e for e in jobs if e not in discarded and e not in seen + batch), None)
        assert following is None or cost + following.cost > room
        seen += batch
    assert seen == [each for each in jobs if each not in discarded]
    assert (len(inbox), inbox.waiting_cost) == (0, 0)


def test_without_room_nothing_is_taken():
    inbox = Inbox()
    generation, _ = inbox.successor()
    inbox.put(job())
    assert inbox.take(generation, room=0, by_cost=False) == []
    assert len(inbox.take(generation, room=1, by_cost=False)) == 1


def test_a_replaced_reader_takes_nothing_and_what_it_had_is_told():
    inbox = Inbox()
    first, lost = inbox.successor()
    assert lost == []
    done, held, waiting = job(), job(), job()
    for each in (done, held):
        inbox.put(each)
    inbox.take(first, room=2, by_cost=True)
    inbox.done([done])
    inbox.put(waiting)
    second, lost = inbox.successor()
    assert lost == [held]
    with pytest.raises(StaleError):
        inbox.take(first, room=2, by_cost=True)
    assert inbox.take(second, room=2, by_cost=True) == [waiting]


def test_a_reader_that_waits_is_woken_by_a_job_and_by_its_successor():
    inbox = Inbox()
    generation, _ = inbox.successor()
    given_job = job()
    threading.Timer(0.05, inbox.put, [given_job]).start()
    assert inbox.take(generation, room=1, by_cost=True, wait_s=30) == [given_job]
    threading.Timer(0.05, inbox.successor).start()
    with pytest.raises(StaleError):
        inbox.take(generation, room=1, by_cost=True, wait_s=30)


def test_a_window_ends_when_the_batch_is_full():
    inbox = Inbox()
    generation, _ = inbox.successor()
    inbox.put(job())
    for delay in (0.02, 0.04):
        threading.Timer(delay, inbox.put, [job()]).start()
    start = time.monotonic()
    assert len(inbox.take(generation, room=3, by_cost=True, window_s=30)) == 3
    assert time.monotonic() - start < 20
