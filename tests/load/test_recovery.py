"""Windows and recovery: nothing is lost between windows, and silence is not health."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.load.records import Fate, Record
from forge_harness.load.recovery import recovery, windows


def answered(index, t, took=0.01, fate=Fate.OK, status=200):
    return Record(index, t, 0, sent=t, done=t + took, status=status, fate=fate)


def steady(start, end, rate=40, **how):
    count = round((end - start) * rate)
    return [answered(i, start + i / rate, **how) for i in range(count)]


def seconds(records, **changed):
    given_ = {"drop": 10.0, "end": 18.0, "rate": 40.0, "baseline_p95": 0.02, "slo_s": 0.1}
    return recovery(records, **{**given_, **changed})


@given(
    st.lists(st.tuples(st.floats(0, 10), st.sampled_from(Fate)), max_size=200),
    st.floats(0, 3),
    st.floats(0, 10),
)
def test_windows_hold_each_request_between_their_ends_once(pairs, start, length):
    records = [Record(i, t, 0, fate=f) for i, (t, f) in enumerate(sorted(pairs))]
    parts = windows(records, start, start + length)
    assert len(parts) == int(length / 0.5 + 1e-9)
    held = sum(w.offered for w in parts)
    end = start + 0.5 * len(parts)
    # A request on an edge, to the last bit, may be on either side.
    inside = sum(start + 1e-9 <= r.intended < end - 1e-9 for r in records)
    touching = sum(start - 1e-9 <= r.intended <= end + 1e-9 for r in records)
    assert inside <= held <= touching
    assert all(w.offered == w.ok + w.shed + w.failed for w in parts)


def test_a_server_that_was_never_away_recovered_at_once():
    assert seconds(steady(10, 18)).seconds == 0


def test_recovery_is_the_end_of_the_last_bad_window():
    slow = steady(10, 11.2, took=0.5)
    assert seconds(slow + steady(11.2, 18)).seconds == 1.5


@pytest.mark.parametrize("fate", [Fate.SHED, Fate.ERROR, Fate.TIMEOUT, Fate.DROPPED, Fate.CENSORED])
def test_one_request_that_was_not_served_makes_its_window_bad(fate):
    records = steady(10, 18)
    records[100].fate = fate  # due at 12.5
    assert seconds(records).seconds == 3.0


def test_an_empty_window_is_not_recovered():
    assert seconds(steady(10, 12) + steady(12.5, 18)).seconds == 2.5


def test_a_server_that_stays_bad_did_not_recover():
    found = seconds(steady(10, 17) + steady(17, 18, took=3))
    assert found.seconds is None
    assert found.measured


def test_completions_alone_would_call_a_hung_server_recovered():
    # Every request of 11..18 is never answered: completions see the good second before it.
    silent = [Record(i, 11 + i / 40, 0, sent=11 + i / 40) for i in range(280)]
    assert seconds(steady(10, 11) + silent).seconds is None


def test_twice_the_baseline_is_the_limit_when_it_is_above_the_objective():
    records = steady(10, 18, took=0.15)
    assert seconds(records, baseline_p95=0.02).seconds is None
    assert seconds(records, baseline_p95=0.08).seconds == 0


def test_a_baseline_without_answers_excuses_nothing():
    found = seconds(steady(10, 18, took=0.15), baseline_p95=math.inf)
    assert (found.seconds, found.limit_s) == (None, 0.1)


def test_a_base_rate_too_low_for_windows_is_said():
    found = seconds(steady(10, 18, rate=2), rate=2.0)
    assert not found.measured
    assert "2/s" in found.problem


def test_nothing_watched_is_not_recovered():
    found = seconds([], end=10.2)
    assert found.problem == "no base load after the overload"
