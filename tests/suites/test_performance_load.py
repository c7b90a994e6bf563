"""The load checks and served_equals_trained: red for servers that stall, drop, or answer wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from forge_harness.load import campaign, driver
from forge_harness.load.peak import Peak
from forge_harness.load.report import peak_json
from forge_harness.protocols import ServerSpec
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

from ..load.support import plan_of, served, silent, write_run
from ..load.test_sabotage import requests_file

FAULTY = Path(__file__).parents[1] / "load" / "server.py"


class ServedBy:
    """A subject with the load tests' own small server, and its faults."""

    name = "served"

    def __init__(self, *faults):
        self._faults = faults

    def server(self, directory, *, secured=False):
        stream = "--truncate" in self._faults
        requests = Path(requests_file(directory / "requests.jsonl", stream=stream))
        options = ("--ready-line", "--service-ms", "4", *self._faults)
        return ServerSpec(command=(sys.executable, str(FAULTY), *options), requests=requests)


BRIEF = ((1, 3),)
"""Where a defect shows in every second, and no percentile needs many requests."""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A campaign of seconds; the shipped one takes half a minute."""
    limits = driver.SearchLimits(cap_s=8, probe_s=1, start=60)
    monkeypatch.setitem(driver.LIMITS, "quick", limits)
    monkeypatch.setattr(campaign, "QUICK", ((1, 6),))
    monkeypatch.setattr(campaign, "TIMEOUT_S", 4.0)
    # A loose objective: a generator that is late by a tenth of it makes the load invalid.
    monkeypatch.setattr(campaign, "OBJECTIVE_S", 2.0)


def measured(run_check, check, subject, **options):
    """Runs a check again where a busy machine kept the load from being what it should."""
    for _ in range(3):
        run = run_check(check, subject, **options)
        if "INVALID load" not in run.reason:
            break
    return run


def rows_of(run):
    return [row for item in run.items for row in item.evidence]


def test_a_sound_server_passes(run_check):
    run = measured(run_check, "performance.load_1x", ServedBy())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


@pytest.mark.parametrize(
    ("check", "faults", "reason"),
    [
        ("performance.load_1x", ("--drop", "0.05"), "failed is"),
        ("performance.load_1x", ("--stale", "0.1"), "neither answered right nor refused"),
        ("performance.load_1x", ("--fail", "0.1"), "status 500"),
        ("integration.served_equals_trained", ("--stale", "0.3"), "wrong_"),
        ("integration.served_equals_trained", ("--truncate", "0.3"), "truncated stream"),
    ],
)
def test_a_server_that_answers_wrong_is_found(run_check, monkeypatch, check, faults, reason):
    # At a given rate: with so many wrong answers the search for the capacity finds none.
    monkeypatch.setattr(campaign, "measure", _at_a_rate)
    monkeypatch.setattr(campaign, "QUICK", BRIEF)
    run = measured(run_check, check, ServedBy(*faults))
    assert run.outcome is Outcome.FAIL, run.reason
    assert reason in run.reason


@pytest.mark.parametrize(
    ("faults", "outcome"), [((), Outcome.PASS), (("--refuse-at", "4.5"), Outcome.FAIL)]
)
def test_a_server_that_refuses_half_of_its_capacity_is_found(
    run_check, monkeypatch, faults, outcome
):
    def five_times(template, directory, **options):
        return _at_a_rate(template, directory, **{**options, "shape": ((1, 3), (5, 4))})

    monkeypatch.setattr(campaign, "measure", five_times)
    run = measured(run_check, "performance.load_5x", ServedBy(*faults), profile="full")
    assert run.outcome is outcome, run.reason
    assert ("answered_share_5x is" in run.reason) is (outcome is Outcome.FAIL)


@pytest.mark.parametrize(
    ("faults", "limit", "outcome"),
    [
        ((), 30, Outcome.PASS),
        (("--start-s", "3"), 3, Outcome.FAIL),
        (("--drop", "1"), 30, Outcome.NOT_MEASURED),
    ],
    ids=["sound", "slow", "no_answer"],
)
def test_the_first_answer_has_a_limit(run_check, monkeypatch, tmp_path, faults, limit, outcome):
    (tmp_path / "policy.toml").write_text(f"[thresholds.performance]\nstart_up.at_most = {limit}\n")
    monkeypatch.setattr(campaign, "measure", _at_a_rate)
    monkeypatch.setattr(campaign, "QUICK", ((1, 1),))
    policy = ("--forge-policy", str(tmp_path / "policy.toml"))
    run = run_check("performance.start_up", ServedBy(*faults), arguments=policy)
    assert run.outcome is outcome, run.reason
    assert ("start_up is" in run.reason) is (outcome is Outcome.FAIL)


def test_a_server_that_stalls_is_found(run_check, monkeypatch):
    # At a given rate, so that the stall falls into base load and not into the search.
    stall = ("--stall-at", "1", "--stall-s", "30")
    monkeypatch.setattr(campaign, "measure", _at_a_rate)
    monkeypatch.setattr(campaign, "QUICK", BRIEF)
    run = measured(run_check, "performance.latency_percentiles", ServedBy(*stall))
    assert run.outcome is Outcome.FAIL, run.reason
    assert "p95_limit is" in run.reason


@pytest.mark.parametrize("check", ["performance.load_1x", "gates.latency"])
def test_a_generator_that_gives_up_measures_nothing(run_check, monkeypatch, check):
    monkeypatch.setattr(campaign, "measure", _one_at_a_time)
    monkeypatch.setattr(campaign, "QUICK", BRIEF)
    run = run_check(check, ServedBy("--service-ms", "60"))
    assert run.outcome is Outcome.NOT_MEASURED
    assert "INVALID load" in run.reason


@pytest.mark.parametrize(
    ("faults", "outcome", "said"),
    [
        (("--no-metrics",), Outcome.PASS, "offers no forge_requests_total"),
        (("--metrics-status", "403"), Outcome.NOT_MEASURED, "metrics:read"),
    ],
    ids=["none", "refused"],
)
def test_a_server_whose_counters_cannot_be_read_is_no_error(
    run_check, monkeypatch, faults, outcome, said
):
    monkeypatch.setattr(campaign, "measure", _at_a_rate)
    monkeypatch.setattr(campaign, "QUICK", BRIEF)
    run = measured(run_check, "performance.load_1x", ServedBy(*faults))
    assert run.outcome is outcome, run.reason
    assert said in " ".join([run.reason, *(row.reason for row in rows_of(run))])


def test_a_percentile_may_be_bounded_by_requests_that_were_never_answered(run_check, monkeypatch):
    plan = plan_of(shape=((1, 6),))
    records = served(plan)
    records = [silent(record) if record.index % 30 == 0 else record for record in records]
    monkeypatch.setattr(campaign, "measure", _as_written(plan, records))
    run = run_check("performance.latency_percentiles", ServedBy())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")
    (found,) = (row for row in rows_of(run) if row.name == "latency_p95")
    assert found.reason.endswith(" s to no answer, each with 99% confidence")


@pytest.mark.parametrize(
    ("late_s", "outcome", "said"),
    [
        # All is held up to the end, which this server does not outlive in order.
        (0.0, Outcome.FAIL, "ended is -15"),
        (5.0, Outcome.NOT_MEASURED, "late (p99)"),
    ],
    ids=["kept", "late"],
)
def test_a_generator_that_is_late_after_an_overload_is_no_slow_server(
    run_check, monkeypatch, late_s, outcome, said
):
    plan = plan_of(shape=((1, 3), (23, 1), (50, 1), (1, 4)))
    last = sum(phase.seconds for phase in plan.phases[:-1])
    records = served(plan)
    for record in records:
        if record.intended >= last:
            record.sent, record.done = record.sent + late_s, record.done + late_s
    monkeypatch.setattr(campaign, "measure", _as_written(plan, records))
    run = run_check("performance.overload_recovery", ServedBy(), profile="full")
    assert run.outcome is outcome, run.reason
    assert said in run.reason


def test_a_server_that_answers_nobody_has_no_median(run_check, monkeypatch):
    plan = plan_of(shape=((1, 3),))
    records = served(plan)
    records = [silent(record) if record.index % 3 else record for record in records]
    monkeypatch.setattr(campaign, "measure", _as_written(plan, records))
    run = run_check("gates.latency", ServedBy())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "latency is" in run.reason


def _as_written(plan, records):
    """Measures what a generator would have written of these records."""

    def measure(template, directory, **options):
        write_run(directory, plan, records)
        peak = Peak(rate=400.0, above=420.0, goodput=400.0, bound="server")
        (directory / "peak.json").write_text(json.dumps(peak_json(peak)))
        return driver.write_report(directory)

    return measure


def _at_a_rate(template, directory, **options):
    return driver.measure(template, directory, base=driver.Base(rate=80), **options)


def _one_at_a_time(template, directory, **options):
    from dataclasses import replace

    cramped = replace(template, concurrency=1)
    return driver.measure(cramped, directory, base=driver.Base(rate=60), **options)


def test_a_subject_without_a_server_is_not_applicable(run_check):
    class Silent:
        name = "silent"

    assert run_check("performance.load_1x", Silent()).outcome is Outcome.NOT_APPLICABLE


def test_the_reference_server_answers_as_the_trained_model(run_check):
    run = run_check("integration.served_equals_trained", ReferenceSubject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")
