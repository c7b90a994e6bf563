"""Real servers with one fault each, under real load: each fault is found, and named.

The objective is loose: a machine that stands still for a third of a second must not make a run
invalid (requests may be sent a tenth of the objective late).
"""

import json
import os
import signal
import threading
import urllib.request
from collections import Counter

import pytest

from forge_harness.load.driver import run_load
from forge_harness.load.session import Generator

from . import support
from .server import label_of


def requests_file(path, *, stream=False, count=20):
    lines = []
    for i in range(count):
        inputs = [[float((i * 7 + j) % 17) for j in range(64)]]
        line = {"path": "/v1/predict", "body": {"inputs": inputs}}
        line["expect"] = {"labels": [label_of(inputs)]}
        if stream:
            tokens = [(k * 7) % 256 for k in range(i + 2)]
            body = {"prompt": "a", "max_tokens": len(tokens), "stream": True}
            line = {"path": "/v1/completions", "body": body, "expect": {"tokens": tokens}}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def loaded(generator, tmp_path):
    """Loads a server with some faults and returns the report."""

    def run(*options, shape=((1, 1.5),), base=120.0, stream=False, **changed):
        file = requests_file(tmp_path / "requests.jsonl", stream=stream)
        settings = {"requests": file, "slo_s": 10.0, **changed}
        with support.serving(*options) as url:
            plan = support.plan_of(url, base, shape, **settings)
            return run_load(generator, plan, tmp_path / "run")

    return run


def details(report):
    found = Counter()
    for phase in report.phases:
        found.update(dict(phase.details))
    return found


def states(report):
    return {gate.name: gate.state for gate in report.gates}


def test_a_sound_server_is_valid_and_every_count_agrees(loaded):
    report = loaded()
    assert report.problems == ()
    books = report.reconciliation
    assert books.counts["ok"] == books.scheduled > 100
    assert books.locust == (books.scheduled, 0)
    assert books.own_codes == books.server_codes == {200: books.scheduled}
    assert (report.checked, report.kinds) == (20, 20)
    assert report.memory[0][1] == 5e7


def test_counters_that_are_refused_are_not_measured(loaded):
    report = loaded("--metrics-status", 403, shape=((1, 1.5),))
    assert states(report)["unexplained requests"] == "not_measured"
    assert (report.problems, report.memory) == ((), ())
    assert report.reconciliation.server_text.startswith("not compared: the server's counters")


def test_a_stall_meets_the_requests_that_were_due_in_it(loaded):
    report = loaded("--service-ms", 5, "--stall-at", 1, "--stall-s", 2, shape=((1, 6),), base=50)
    by_share = {p.share: p for p in report.phases[0].response}
    # A third of the requests were due in the 2 s; a closed loop would show a p95 of 34 ms.
    assert 1.2 < by_share[0.95].value < 2.2
    assert by_share[0.5].value < 0.5
    service = {p.share: p for p in report.phases[0].service}
    assert service[0.95].value == pytest.approx(by_share[0.95].value, abs=0.2)


def test_dropped_connections_are_errors_and_not_tried_again(loaded):
    report = loaded("--drop", 0.01, shape=((1, 4),), base=200)
    failed = report.phases[0].counts["error"]
    # 1 % of about 800, to six standard deviations.
    assert 1 <= failed <= 25
    assert states(report)["1x failed requests"] == "fail"
    assert report.reconciliation.unexplained == 0
    assert (
        sum(report.reconciliation.server_codes.values()) == report.reconciliation.scheduled - failed
    )


def test_shedding_is_allowed_under_overload_only(loaded):
    report = loaded(
        "--service-ms", 10, "--queue", 20, shape=((1, 1), (23, 1), (1, 1)), base=20
    )  # fmt: skip
    first, overload, _ = report.phases
    assert overload.counts["shed"] > 100
    assert first.counts["shed"] == 0
    assert overload.counts["error"] == overload.counts["timeout"] == 0
    # 20 waiting, 10 ms each: what is accepted is answered soon, and the others at once.
    assert {p.share: p for p in overload.response}[0.5].value < 0.5
    assert report.reconciliation.unexplained == 0
    assert states(report)["23x errors"] == "pass"


def test_base_load_may_not_be_shed(loaded):
    report = loaded("--queue", 0)
    assert states(report)["1x shed requests"] == "fail"
    assert report.phases[0].counts["shed"] == report.phases[0].offered


def test_a_server_that_begins_to_refuse_below_overload_fails(loaded):
    report = loaded("--refuse-at", 2, shape=((1, 1.5), (5, 1), (10, 0.5), (1, 1.5)), base=80)
    assert report.verdict == "FAIL"
    assert report.phases[2].counts["ok"] == report.phases[3].counts["ok"] == 0
    found = states(report)
    assert found["1x shed requests"] == "pass"
    refused = ("5x shed requests", "10x accepted share", "1x (again) shed requests")
    assert {found[name] for name in refused} == {"fail"}


def test_a_refusal_without_retry_after_is_an_error(loaded):
    report = loaded("--queue", 0, "--no-retry-after")
    assert details(report)["status 503 without Retry-After"] == report.phases[0].offered


@pytest.mark.parametrize("stream", [False, True])
def test_truncated_answers_are_found(loaded, stream):
    report = loaded("--cut", 0.2, stream=stream)
    (said,) = details(report)
    assert "Incomplete response" in said
    assert 1 <= report.phases[0].counts["error"] < report.phases[0].offered


def test_truncated_streams_are_found(loaded):
    report = loaded("--truncate", 0.2, stream=True)
    assert set(details(report)) == {"truncated stream: no [DONE]"}
    assert states(report)["1x failed requests"] == "fail"


def test_whole_streams_are_right(loaded):
    report = loaded(stream=True)
    assert report.phases[0].counts["ok"] == report.phases[0].offered
    assert report.phases[0].first_byte[0].value <= report.phases[0].response[0].value


def test_a_stale_cache_is_found(loaded):
    report = loaded("--stale", 0.2)
    assert set(details(report)) == {"answer to another request (request_id)"}
    assert states(report)["1x failed requests"] == "fail"


def test_a_proxy_that_mixes_answers_up_is_found(loaded):
    report = loaded("--foreign-id")
    assert details(report)["answer to another request (X-Request-Id)"] == report.phases[0].offered


def test_an_answer_that_is_announced_is_the_one_that_counts(loaded):
    report = loaded("--early-hints")
    assert report.problems == ()
    assert report.reconciliation.counts["ok"] == report.phases[0].offered
    assert report.reconciliation.unexplained == 0


def test_an_answer_without_an_end_is_cut_off_and_is_an_error(loaded):
    report = loaded("--endless", base=8.0, timeout_s=20.0)
    assert report.phases[0].counts["error"] == report.phases[0].offered > 3
    assert details(report) == {
        "HTTPParseError: the answer is larger than 16 MiB": report.phases[0].offered
    }


def test_failures_are_counted_by_status(loaded):
    report = loaded("--fail", 0.2)
    assert set(details(report)) == {"status 500"}
    codes = report.reconciliation.own_codes
    assert codes[500] == report.phases[0].counts["error"]
    assert codes == report.reconciliation.server_codes


def test_answers_after_the_deadline_are_timeouts(loaded):
    report = loaded("--service-ms", 5, "--stall-at", 0.5, "--stall-s", 1.5, timeout_s=0.3)
    assert report.phases[0].counts["timeout"] > 20
    assert report.reconciliation.unexplained == 0


def test_a_server_that_loses_count_makes_the_run_invalid(loaded):
    report = loaded("--undercount", 0.1)
    assert report.verdict == "INVALID"
    assert any("the server's counters and the records differ by" in p for p in report.problems)


def test_somebody_else_using_the_server_makes_the_run_invalid(generator, tmp_path):
    body = json.dumps({"inputs": [[1.0] * 64]}).encode()
    with support.serving() as url:
        other = threading.Timer(
            1.0, lambda: urllib.request.urlopen(f"{url}/v1/predict", data=body).close()
        )
        other.start()
        report = run_load(generator, support.plan_of(url, 50, ((1, 2),)), tmp_path)
        other.join()
    assert report.reconciliation.unexplained == 1
    assert report.verdict == "INVALID"


def test_a_generator_that_may_not_have_enough_in_flight_is_invalid(loaded):
    report = loaded("--service-ms", 50, concurrency=2)
    assert report.verdict == "INVALID"
    assert report.phases[0].counts["dropped"] > 0
    assert "not sent: 2 were in flight" in report.problems[0]


def test_a_generator_that_is_held_up_is_invalid_and_not_the_servers_fault(generator, loaded):
    pid = generator.pid
    stop = threading.Timer(0.8, os.kill, (pid, signal.SIGSTOP))
    go = threading.Timer(1.4, os.kill, (pid, signal.SIGCONT))
    stop.start()
    go.start()
    report = loaded(slo_s=2.0)
    go.join()
    assert report.verdict == "INVALID"
    assert "ms late (p99)" in report.problems[0]
    assert report.phases[0].counts["ok"] == report.phases[0].offered
    # What was due in the 0.6 s still counts from when it was due.
    assert {p.share: p for p in report.phases[0].response}[0.95].value > 0.2


def test_the_token_is_sent_and_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FORGE_TEST_TOKEN", "s3cret-token")
    with support.serving("--token", "s3cret-token") as url, Generator(tmp_path / "log") as own:
        plan = support.plan_of(url, 50, ((1, 1),), token_env="FORGE_TEST_TOKEN")
        books = run_load(own, plan, tmp_path).reconciliation
    assert books.counts["ok"] == books.scheduled
    for path in tmp_path.rglob("*.*"):
        assert b"s3cret-token" not in path.read_bytes(), path
