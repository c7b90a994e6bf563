"""Which limits a run is held to, and that each fails when it is broken."""

import math
from dataclasses import replace

import pytest

from forge_harness.load.analysis import analyse
from forge_harness.load.gates import gates
from forge_harness.load.peak import Peak
from forge_harness.load.records import Fate
from forge_harness.load.recovery import Recovery

from . import support

PLAN = support.plan_of(shape=((1, 12), (23, 2), (1, 4)))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("load") / "run"
    return analyse(support.write_run(directory, PLAN, support.served(PLAN)))


def judged(report, **changed):
    """Name -> state of the gates of a run with some phases or figures changed."""
    given_ = {"phases": report.phases, "recovery": report.recovery, "memory": report.memory,
              "peak": report.peak, **changed}  # fmt: skip
    return {gate.name: gate.state for gate in gates(report.plan, **given_)}


def with_counts(phase, **counts):
    return replace(phase, counts={**phase.counts, **counts})


def test_a_good_run_passes_them_all(good):
    found = judged(good)
    assert set(found.values()) == {"pass"}
    assert list(found) == [
        "1x failed requests",
        "1x shed requests",
        "1x response p95",
        "23x errors",
        "23x response p99",
        "1x (again) failed requests",
        "recovery",
        "memory after over before",
    ]


@pytest.mark.parametrize(
    ("index", "counts", "name"),
    [
        (0, {"error": 1}, "1x failed requests"),
        (0, {"timeout": 1}, "1x failed requests"),
        (0, {"shed": 1}, "1x shed requests"),
        (1, {"error": 1}, "23x errors"),
        (2, {"timeout": 1}, "1x (again) failed requests"),
    ],
)
def test_one_request_too_many_fails(good, index, counts, name):
    phases = list(good.phases)
    phases[index] = with_counts(phases[index], **counts)
    found = judged(good, phases=phases)
    assert found[name] == "fail"
    # Requests shed under overload have no measured time here.
    assert {gate for gate, state in found.items() if state == "fail"} == {name}


def test_overload_may_shed_and_time_out_but_refusals_are_timed(good):
    phases = list(good.phases)
    phases[1] = with_counts(phases[1], shed=7)
    assert judged(good, phases=phases)["23x refusal p95"] == "not_measured"


def test_an_overload_answered_504_is_not_in_time_however_fast_they_are(tmp_path):
    def gave_up(record):
        return replace(record, status=504, fate=Fate.TIMEOUT, detail="status 504")

    records = [
        gave_up(r) if 12 <= r.intended < 14 and r.index % 5 else r for r in support.served(PLAN)
    ]
    report = analyse(support.write_run(tmp_path, PLAN, records))
    states = {gate.name: gate.state for gate in report.gates}
    assert (report.verdict, states["23x response p99"]) == ("FAIL", "fail")


def test_slow_answers_fail_from_the_objective_on(good):
    def at(seconds):
        phases = [
            replace(p, response=tuple(replace(q, value=seconds) for q in p.response))
            for p in good.phases
        ]
        return judged(good, phases=phases)

    assert at(PLAN.slo_s)["1x response p95"] == "pass"
    slow = at(math.nextafter(PLAN.slo_s, 1))
    assert (slow["1x response p95"], slow["23x response p99"]) == ("fail", "fail")
    assert at(math.inf)["23x response p99"] == "fail"


RAMP = support.plan_of(shape=((1, 6), (5, 3), (10, 3), (1, 6)))
"""Up to all the server can do, and never beyond."""


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    directory = tmp_path_factory.mktemp("load") / "run"
    return analyse(support.write_run(directory, RAMP, support.served(RAMP)))


def test_below_overload_every_phase_is_all_served_in_time(ramp):
    found = judged(ramp)
    assert set(found.values()) == {"pass"}
    assert list(found) == [
        *("1x failed requests", "1x shed requests", "1x response p95"),
        *("5x failed requests", "5x shed requests", "5x response p95"),
        *("10x failed requests", "10x accepted share", "10x response p95"),
        *("1x (again) failed requests", "1x (again) shed requests", "1x (again) response p95"),
        "memory after over before",
    ]


@pytest.mark.parametrize(("index", "name"), [(0, "1x"), (1, "5x"), (3, "1x (again)")])
def test_one_request_shed_below_overload_fails(ramp, index, name):
    phases = list(ramp.phases)
    phases[index] = with_counts(phases[index], shed=1)
    found = judged(ramp, phases=phases)
    assert {gate for gate, state in found.items() if state == "fail"} == {f"{name} shed requests"}


@pytest.mark.parametrize(("share", "state"), [(0.0199, "pass"), (0.0201, "fail"), (1, "fail")])
def test_at_ten_times_as_much_may_be_shed_as_in_a_probe_that_is_served(ramp, share, state):
    phases = list(ramp.phases)
    phases[2] = replace(with_counts(phases[2], shed=round(10_000 * share)), offered=10_000)
    assert judged(ramp, phases=phases)["10x accepted share"] == state


@pytest.mark.parametrize(("index", "name"), [(1, "5x"), (2, "10x"), (3, "1x (again)")])
def test_every_phase_below_overload_keeps_the_objective(ramp, index, name):
    phases = list(ramp.phases)
    slow = tuple(replace(p, value=RAMP.slo_s * 1.01) for p in phases[index].response)
    phases[index] = replace(phases[index], response=slow)
    found = judged(ramp, phases=phases)
    assert {gate for gate, state in found.items() if state == "fail"} == {f"{name} response p95"}


@pytest.mark.parametrize("index", range(4))
def test_a_phase_without_requests_is_not_measured(ramp, index):
    phases = list(ramp.phases)
    none = tuple(replace(p, value=None, count=0) for p in phases[index].response)
    phases[index] = replace(phases[index], offered=0, response=none)
    states = [gate.state for gate in gates(RAMP, phases, recovery=None, memory=(), peak=None)]
    assert states.count("not_measured") == 3
    assert "fail" not in states


def test_an_overload_without_requests_is_not_measured(good):
    phases = list(good.phases)
    phases[1] = replace(phases[1], offered=0, good=0)
    peak = Peak(rate=1.0, above=None, goodput=1.0, bound="limit")
    found = judged(good, phases=phases, peak=peak)
    assert found["23x errors"] == found["23x goodput over peak"] == "not_measured"


@pytest.mark.parametrize(("multiple", "name"), [(5, ""), (10, "10x accepted share")])
def test_a_lower_load_after_an_overload_is_held_to_its_recovery(good, multiple, name):
    phases = [*good.phases[:2], replace(good.phases[2], name=f"{multiple}x", multiple=multiple)]
    found = judged(good, phases=phases)
    assert f"{multiple}x shed requests" not in found
    assert not name or name in found


def test_counters_that_were_lost_are_not_measured(good):
    assert judged(good, counters_lost="they were lost")["unexplained requests"] == "not_measured"


@pytest.mark.parametrize(
    ("seconds", "problem", "state"),
    [(2.0, "", "pass"), (2.5, "", "fail"), (None, "", "fail"), (None, "too slow", "not_measured")],
)
def test_recovery_is_two_seconds_and_never_is_a_failure(good, seconds, problem, state):
    found = Recovery(seconds=seconds, watched_s=4, limit_s=0.5, problem=problem)
    assert judged(good, recovery=found)["recovery"] == state


@pytest.mark.parametrize(("after", "state"), [(105.0, "pass"), (106.0, "fail"), (50.0, "pass")])
def test_memory_comes_back(good, after, state):
    found = judged(good, memory=[(0.5, 100.0), (13.0, 900.0), (18.0, after)])
    assert found["memory after over before"] == state


def test_memory_that_was_not_read_is_no_gate(good):
    assert "memory after over before" not in judged(good, memory=[(5.0, 100.0)])
    # What an exporter says that does not know it.
    assert "memory after over before" not in judged(good, memory=[(0.5, 0.0), (18.0, 100.0)])


def test_no_two_gates_have_one_name_however_often_a_phase_comes_back(good):
    phases = [*good.phases, *good.phases[1:], good.phases[2]]
    peak = Peak(rate=1.0, above=None, goodput=1.0, bound="limit")
    names = [gate.name for gate in gates(PLAN, phases, recovery=None, memory=(), peak=peak)]
    assert len(names) == len(set(names))
    assert "1x (again, 3) failed requests" in names


def half_good(good):
    """The phases of a run that shed half of its overload, and the good answers a second of that."""
    overload = good.phases[1]
    half = replace(overload, good=overload.offered // 2)
    return [good.phases[0], half, good.phases[2]], half.goodput


def test_overload_keeps_four_fifths_of_the_peak(good):
    phases, goodput = half_good(good)
    for share, state in ((0.81, "pass"), (0.79, "fail")):
        peak = Peak(rate=1.0, above=None, goodput=goodput / share, bound="limit")
        assert judged(good, phases=phases, peak=peak)["23x goodput over peak"] == state


def test_a_capacity_that_was_given_is_held_to_as_one_that_was_found(good):
    phases, goodput = half_good(good)
    for share, state in ((0.81, "pass"), (0.79, "fail")):
        plan = replace(PLAN, capacity=goodput / share)
        found = judged(replace(good, plan=plan), phases=phases)
        assert found["23x goodput over peak"] == state


def test_an_overload_below_the_capacity_is_held_to_what_was_offered(good):
    peak = Peak(rate=1e4, above=None, goodput=1e4, bound="limit")
    assert judged(good, peak=peak)["23x goodput over peak"] == "pass"
    phases, _ = half_good(good)
    assert judged(good, phases=phases, peak=peak)["23x goodput over peak"] == "fail"
