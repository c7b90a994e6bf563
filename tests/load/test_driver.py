"""From an address to a report: the capacity is found, the phases are shares of it."""

import json

import pytest

from forge_harness.errors import LoadError
from forge_harness.load import driver
from forge_harness.load.driver import Base, SearchLimits, find_peak, measure, read_probe
from forge_harness.load.peak import Peak

from . import support

LIMITS = SearchLimits(cap_s=20, probe_s=1.0, start=80)


def test_the_peak_of_a_server_of_known_speed(generator, tmp_path):
    probes = []
    with support.serving("--service-ms", 10) as url:
        # 100/s, and an objective that a queue of 1 s does not keep.
        template = support.plan_of(url, slo_s=0.1)
        peak = find_peak(generator, template, tmp_path, LIMITS, on_probe=probes.append)
    # Never more than there is; less where a busy machine made the generator give up first.
    assert peak.rate <= 125
    assert peak.bound == "generator" or (peak.bound == "server" and peak.rate >= 50)
    assert peak.probes == tuple(probes)
    kept = json.loads((tmp_path / "peak.json").read_bytes())
    assert kept["rate"] == peak.rate
    assert len(list((tmp_path / "probes").iterdir())) == len(probes)


def test_a_server_that_serves_nothing_has_no_share_to_take(monkeypatch, tmp_path):
    quick = SearchLimits(cap_s=20, probe_s=0.5, start=2)
    monkeypatch.setitem(driver.LIMITS, "quick", quick)
    with support.serving("--queue", 0) as url, pytest.raises(LoadError, match="even 1 request/s"):
        measure(support.plan_of(url), tmp_path, profile="quick")


@pytest.mark.parametrize(
    ("bound", "said"),
    [("time", "its time was over before less than 5/s was tried"), ("generator", "could not keep")],
)
def test_a_search_that_found_out_nothing_blames_no_server(bound, said):
    """After two probes of a slow server it said that not even 1 request/s was served."""
    with pytest.raises(LoadError, match=said):
        driver._capacity(Peak(rate=0.0, above=5.0, goodput=0.0, bound=bound))


def test_the_base_is_a_share_of_a_capacity_that_is_known(tmp_path):
    with support.serving() as url:
        report = measure(
            support.plan_of(url, slo_s=2.0),
            tmp_path / "run",
            profile="quick",
            shape=((1, 1), (5, 0.5)),
            base=Base(capacity=400.0, share=0.05),
        )
    assert [phase.rate for phase in report.plan.phases] == [20, 100]
    assert report.plan.capacity == 400
    assert report.context["locust"]
    assert json.loads((tmp_path / "run" / "report.json").read_bytes())["verdict"] == report.verdict


def test_a_run_that_is_interrupted_is_reported_as_far_as_it_came(tmp_path):
    def interrupt(step):
        if step.sent > 30:
            raise KeyboardInterrupt

    shape = ((1, 60),)
    with support.serving() as url, pytest.raises(KeyboardInterrupt):
        measure(
            support.plan_of(url), tmp_path, profile="quick", shape=shape, base=Base(rate=60),
            on_step=interrupt,
        )  # fmt: skip
    document = json.loads((tmp_path / "report.json").read_bytes())
    assert document["verdict"] == "INVALID"
    assert document["reconciliation"]["counts"]["ok"] >= 20


def test_a_search_that_is_interrupted_leaves_no_report(tmp_path):
    def interrupt(step):
        raise KeyboardInterrupt

    with support.serving() as url, pytest.raises(KeyboardInterrupt):
        measure(support.plan_of(url), tmp_path, profile="quick", on_step=interrupt)
    assert not (tmp_path / "report.json").exists()


def test_each_probe_is_read_with_the_requests_it_sent(generator, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"path": "/v1/predict", "body": {"inputs": [[3]]}, "expect": {"labels": [3]}}')

    def remove(probe):
        file.unlink(missing_ok=True)

    limits = SearchLimits(cap_s=4.5, probe_s=0.5, start=20)
    with support.serving() as url:
        template = support.plan_of(url, requests=str(file), slo_s=5.0)
        with pytest.raises(LoadError, match="cannot be read"):
            find_peak(generator, template, tmp_path / "run", limits, on_probe=remove)
    assert read_probe(tmp_path / "run" / "probes" / "00").good > 0


def test_nothing_is_written_when_nothing_answers(tmp_path):
    with pytest.raises(LoadError, match="Nothing answers"):
        measure(support.plan_of(), tmp_path / "run", profile="quick")
    assert not (tmp_path / "run").exists()


def test_another_runs_directory_is_refused(tmp_path):
    (tmp_path / "old").write_text("x")
    with support.serving() as url, pytest.raises(LoadError, match="not an empty directory"):
        measure(support.plan_of(url), tmp_path, profile="quick")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
