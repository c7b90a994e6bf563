"""The search for the peak, against servers whose peak is known."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from forge_harness.load.peak import Probe, search


class Clock:
    def __init__(self):
        self.t = 0.0

    def __call__(self):
        return self.t


def model(peak, clock, *, generator=1e9, probe_s=3.0):
    """A server that serves everything up to its peak, and a generator with a limit of its own."""
    asked = []

    def probe(rate):
        clock.t += probe_s
        asked.append(rate)
        offered = max(round(rate * probe_s), 1)
        good = offered if rate <= peak else round(offered * peak / rate * 0.5)
        return Probe(
            rate=rate,
            offered=offered,
            good=good,
            goodput=good / probe_s,
            p95_s=0.01 if rate <= peak else 5.0,
            valid=rate <= generator,
        )

    return probe, asked


def run(probe, clock, **changed):
    given_ = {"start": 20.0, "slo_s": 0.5, "cap_s": 1e9, "probe_s": 3.0, "clock": clock}
    return search(probe, **{**given_, **changed})


@given(st.floats(1.5, 20_000), st.floats(1, 500))
def test_the_peak_is_bracketed_to_a_tenth(peak, start):
    clock = Clock()
    probe, _ = model(peak, clock)
    found = run(probe, clock, start=start)
    assert found.rate <= peak < found.above <= 1.1 * found.rate + 1e-9
    assert found.bound == "server"
    assert not found.is_lower_bound


@given(st.floats(0.1, 20_000), st.floats(0, 120))
def test_the_wall_clock_is_never_exceeded(peak, cap):
    clock = Clock()
    probe, asked = model(peak, clock)
    found = run(probe, clock, cap_s=cap)
    assert clock.t <= cap
    assert len(found.probes) == len(asked)
    assert found.rate <= peak


def test_a_search_that_ran_out_of_time_says_at_least():
    clock = Clock()
    probe, _ = model(5000, clock)
    found = run(probe, clock, cap_s=9.5)
    assert (found.rate, found.bound, found.is_lower_bound) == (80.0, "time", True)


def test_a_generator_that_cannot_send_more_is_not_the_servers_peak():
    clock = Clock()
    probe, _ = model(1e6, clock, generator=300)
    found = run(probe, clock)
    assert found.bound == "generator"
    assert found.is_lower_bound
    assert 270 <= found.rate <= 300


def test_a_generator_that_cannot_even_send_the_least_blames_no_server():
    clock = Clock()
    probe, _ = model(0.0, clock, generator=0.0)
    found = run(probe, clock)
    assert (found.rate, found.bound, found.is_lower_bound) == (0.0, "generator", True)


def test_a_probe_in_which_nothing_was_due_says_nothing():
    """At 1/s one of seven probes of 2 s is such a one, and ended the search."""
    clock = Clock()
    inner, asked = model(1.0, clock)

    def probe(rate):
        found = inner(rate)
        if asked.count(rate) == 1:
            return replace(found, offered=0, good=0, goodput=0.0, p95_s=None)
        return found

    found = run(probe, clock, start=1.0)
    assert (found.rate, asked[:2]) == (1.0, [1.0, 1.0])


def test_a_server_that_serves_nothing_ends_the_search():
    clock = Clock()
    probe, asked = model(0.0, clock)
    found = run(probe, clock)
    assert (found.rate, found.bound) == (0.0, "nothing")
    assert asked[-1] == 1.0


def test_the_highest_rate_allowed_ends_the_search():
    clock = Clock()
    probe, _ = model(1e9, clock)
    found = run(probe, clock, highest=100.0)
    assert (found.rate, found.bound, found.above) == (100.0, "limit", None)


def test_good_answers_and_their_time_both_count():
    kept = {"rate": 10.0, "offered": 100, "goodput": 33.0, "valid": True}
    assert Probe(good=98, p95_s=0.5, **kept).serves(0.5)
    assert not Probe(good=97, p95_s=0.5, **kept).serves(0.5)
    assert not Probe(good=98, p95_s=0.51, **kept).serves(0.5)
    assert not Probe(good=98, p95_s=None, **kept).serves(0.5)
