"""The report of a directory: what is wrong in the files is in the verdict."""

import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness.errors import ExitCode, LoadError
from forge_harness.load.analysis import analyse
from forge_harness.load.driver import write_report
from forge_harness.load.plan import read_plan
from forge_harness.load.records import Fate
from forge_harness.load.report import peak_from_json, table
from forge_harness.load.schedule import phase_starts

from . import support

PLAN = support.plan_of(shape=((1, 12), (23, 2), (1, 4)))
RECORDS = support.served(PLAN)


def first_phase(change, count=1):
    return [*map(change, RECORDS[:count]), *RECORDS[count:]]


def rewrite(path, **changed):
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changed}))


def test_a_good_run_passes(tmp_path):
    report = analyse(support.write_run(tmp_path, PLAN, RECORDS))
    assert (report.verdict, report.problems, report.exit_code) == ("PASS", (), ExitCode.PASS)
    assert report.recovery.seconds == 0
    assert report.reconciliation.unexplained == 0
    assert sum(phase.offered for phase in report.phases) == len(RECORDS)
    assert [phase.start for phase in report.phases] == [0, 12, 14]


def test_the_same_directory_gives_the_same_bytes(tmp_path):
    directory = support.write_run(tmp_path, PLAN, first_phase(support.shed, 3))
    write_report(directory)
    once = (directory / "report.json").read_bytes()
    write_report(directory)
    assert (directory / "report.json").read_bytes() == once
    document = json.loads(once)
    assert document["schema"] == "forge-load/1"
    assert document["verdict"] == "FAIL"


@settings(max_examples=15)
@given(st.integers(0, 2**32))
def test_offered_is_the_sum_of_the_classes_whatever_happened(tmp_path_factory, seed):
    fates = random.Random(seed).choices(list(Fate), k=len(RECORDS))
    directory = tmp_path_factory.mktemp("run")
    records = [replace(r, fate=fate) for r, fate in zip(RECORDS, fates, strict=True)]
    report = analyse(support.write_run(directory, PLAN, records, server=False))
    for phase in report.phases:
        assert phase.offered == sum(phase.counts.values())
    books = report.reconciliation
    assert books.scheduled == sum(books.counts.values()) == len(RECORDS)
    assert f"offered {len(RECORDS)} = {fates.count(Fate.OK)} ok + " in table(report)
    json.loads(report.to_json())


def test_answers_that_never_came_are_the_slowest(tmp_path):
    report = analyse(support.write_run(tmp_path, PLAN, first_phase(support.silent, 100)))
    p95 = next(p for p in report.phases[0].response if p.share == 0.95)
    assert math.isinf(p95.value)
    assert report.verdict == "FAIL"
    state = json.loads(report.to_json())["phases"][0]["response"][2]
    assert (state["state"], state["value_s"]) == ("no_answer", None)


def test_a_request_without_a_record_makes_the_run_invalid(tmp_path):
    report = analyse(support.write_run(tmp_path, PLAN, RECORDS[1:]))
    assert report.verdict == "INVALID"
    assert report.exit_code == ExitCode.INCOMPLETE
    assert any("1 missing, 0 twice" in problem for problem in report.problems)
    assert report.phases[0].counts["censored"] == 1
    told = table(report).splitlines()
    assert not [line for line in told if line.startswith("  pass")]
    assert len([line for line in told if line.startswith("  void")]) == len(report.gates)


def test_a_record_twice_makes_the_run_invalid(tmp_path):
    report = analyse(support.write_run(tmp_path, PLAN, [*RECORDS, RECORDS[7]]))
    assert any("0 missing, 1 twice" in problem for problem in report.problems)


@pytest.mark.parametrize("counts", [(0, 0), (-1, 0), (0, 1)])
def test_locust_must_have_counted_the_same(tmp_path, counts):
    counted = {"requests": len(RECORDS) + counts[0], "failures": counts[1]}
    report = analyse(support.write_run(tmp_path, PLAN, RECORDS, locust=counted))
    assert (report.verdict == "INVALID") == (counts != (0, 0))


@pytest.mark.parametrize(("scale", "verdict"), [(1, "PASS"), (2, "INVALID"), (0, "INVALID")])
def test_the_server_must_have_counted_the_same(tmp_path, scale, verdict):
    directory = support.write_run(tmp_path, PLAN, RECORDS)
    (directory / "server-after.prom").write_text(support.counters(RECORDS, scale=scale))
    assert analyse(directory).verdict == verdict


def test_requests_of_before_the_run_are_not_counted(tmp_path):
    directory = support.write_run(tmp_path, PLAN, RECORDS)
    (directory / "server-before.prom").write_text(support.counters(RECORDS))
    (directory / "server-after.prom").write_text(support.counters(RECORDS, scale=2))
    assert analyse(directory).verdict == "PASS"


def test_a_server_without_counters_is_said_and_no_problem(tmp_path):
    report = analyse(support.write_run(tmp_path, PLAN, RECORDS, server=False))
    assert report.verdict == "PASS"
    assert "it offers no forge_requests_total" in table(report)


def test_a_server_that_lost_its_counters_is_said_and_not_passed(tmp_path):
    directory = support.write_run(tmp_path, PLAN, RECORDS)
    (directory / "server-after.prom").unlink()
    report = analyse(directory)
    assert (report.verdict, report.exit_code) == ("INCOMPLETE", ExitCode.INCOMPLETE)
    assert "not compared: the server's counters could not be read at the end" in table(report)
    assert "offers no forge_requests_total" not in table(report)
    (directory / "server-after.prom").write_text("up 1")
    (directory / "server-before.prom").write_text(support.counters(RECORDS))
    assert analyse(directory).reconciliation.counters_lost


@pytest.mark.parametrize(
    ("later", "verdict"), [(1000.0, "PASS"), (1001.0, "PASS"), (1002.5, "INCOMPLETE")]
)
def test_counters_of_another_process_are_not_compared(tmp_path, later, verdict):
    """It was taken for somebody else's load, and the run for INVALID, whatever had failed."""
    directory = support.write_run(tmp_path, PLAN, RECORDS)
    found = RECORDS if verdict == "PASS" else RECORDS[len(RECORDS) // 2 :]
    for when, start, counted in (("before", 1000.0, []), ("after", later, found)):
        text = f"process_start_time_seconds {start}\n{support.counters(counted)}"
        (directory / f"server-{when}.prom").write_text(text)
    report = analyse(directory)
    assert report.verdict == verdict
    assert ("of another process" in table(report)) is (verdict != "PASS")


def test_counters_that_were_refused_are_not_passed(tmp_path):
    """A token of role client has no metrics:read: the run passed, with "offers none"."""
    directory = support.write_run(tmp_path, PLAN, RECORDS, server=False)
    (directory / "server-refused.json").write_text('{"status": 403}')
    report = analyse(directory)
    assert report.verdict == "INCOMPLETE"
    (gate,) = [gate for gate in report.gates if gate.name == "unexplained requests"]
    assert gate.state == "not_measured"
    assert "answers 403): use a token whose role has metrics:read" in gate.reason
    assert "offers no forge_requests_total" not in table(report)


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/predict?trace=1", "/v1/predict"),
        ("/v1/%70redict#x", "/v1/predict"),
        ("/v1/predictt", "unmatched"),
    ],
)
def test_a_path_is_compared_with_the_route_it_is_counted_under(tmp_path, path, route):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"path": path}) + "\n")
    plan = support.plan_of(requests=str(file))
    records = support.served(plan, kinds=1)
    directory = support.write_run(tmp_path / "run", plan, records)
    plan = read_plan(directory / "plan.json")
    generator = json.loads((directory / "generator-0.json").read_text())
    generator["plan_digest"] = plan.digest
    (directory / "generator-0.json").write_text(json.dumps(generator))
    for when, counted in (("before", []), ("after", records)):
        text = support.counters(counted, route) + '\nforge_requests_total{route="/x",code="200"} 3'
        (directory / f"server-{when}.prom").write_text(text)
    assert analyse(directory).reconciliation.unexplained == 0
    assert analyse(directory).verdict == "PASS"


def test_a_server_that_died_fails_and_is_not_the_generators_fault(tmp_path):
    directory = support.write_run(tmp_path, PLAN, [*RECORDS[:-9], *map(refused, RECORDS[-9:])])
    (directory / "server-after.prom").unlink()
    report = analyse(directory)
    assert (report.verdict, report.problems) == ("FAIL", ())


def refused(record):
    return replace(record, status=None, fate=Fate.ERROR, detail="ConnectionRefusedError")


def test_a_run_that_was_stopped_is_said_and_never_green(tmp_path):
    directory = support.write_run(tmp_path, PLAN, RECORDS)
    rewrite(directory / "generator-0.json", stopped_at=17.96)
    report = analyse(directory)
    assert report.problems == ("the run was stopped at 18.0 s of 18 s",)
    assert report.exit_code == ExitCode.INCOMPLETE


def test_the_report_is_of_what_was_sent_whatever_becomes_of_the_request_file(tmp_path):
    file = tmp_path / "mine.jsonl"
    line = '{"path": "/v1/predict", "body": {"inputs": [[3]]}%s}\n'
    file.write_text(line % "")
    plan = support.plan_of(shape=((1, 12),), requests=str(file))
    run = tmp_path / "run"
    run.mkdir()
    written = read_plan(plan.write(run))
    support.write_run(run, written, support.served(plan, kinds=1))
    once = write_report(run).to_json()
    assert json.loads(once)["requests"] == {"kinds": 1, "with_expected_answer": 0}
    file.write_text(line % ', "expect": {"labels": [3]}')
    assert write_report(run).to_json() == once
    file.unlink()
    assert write_report(run).to_json() == once
    assert (run / "report.json").read_bytes() == once
    (run / "requests.jsonl").write_text(line % ', "expect": {"labels": [3]}')
    with pytest.raises(LoadError, match="is not what was sent"):
        write_report(run)


@pytest.mark.parametrize("index", [2, 4])
def test_the_recovery_of_each_overload_counts(tmp_path, index):
    plan = support.plan_of(shape=((1, 4), (23, 1), (5, 4), (23, 1), (1, 4)))
    start = phase_starts(plan.phases)[index]
    records = [
        support.shed(r) if start + 3 <= r.intended < start + 4 else r for r in support.served(plan)
    ]
    report = analyse(support.write_run(tmp_path, plan, records))
    assert (report.recovery.measured, report.recovery.seconds) == (True, None)
    assert report.verdict == "FAIL"


def test_a_slow_generator_makes_the_run_invalid(tmp_path):
    report = analyse(support.write_run(tmp_path, PLAN, RECORDS, cpu=0.97))
    assert report.verdict == "INVALID"
    assert "23x: the generator used 97 % of a core" in report.problems


def test_a_worker_that_left_nothing_makes_the_run_invalid(tmp_path):
    directory = support.write_run(tmp_path, PLAN, RECORDS)
    rewrite(directory / "generator-0.json", of=2)
    assert "generator processes that ended well: 1 of 2" in analyse(directory).problems
    rewrite(directory / "generator-0.json", of=10**12)  # Not all of them are counted up.
    assert f"generator processes that ended well: 1 of {10**12}" in analyse(directory).problems
    (directory / "generator-0.json").unlink()
    assert "generator processes that ended well: none" in analyse(directory).problems


def test_files_of_another_plan_are_refused(tmp_path):
    directory = support.write_run(tmp_path, PLAN, RECORDS)
    rewrite(directory / "generator-0.json", plan_digest="sha256:0")
    with pytest.raises(LoadError, match="tells of another plan"):
        analyse(directory)


PEAK = {
    "rate": 1.0, "above": 2.0, "goodput": 1.0, "bound": "server",
    "probes": [{"rate": 2.0, "offered": 3, "good": 0, "goodput": 0.0, "p95_s": None,
                "valid": True}],
}  # fmt: skip


@pytest.mark.parametrize("name", ["locust.json", "memory.json", "peak.json", "generator-0.json"])
def test_a_damaged_file_is_said_by_name(tmp_path, name):
    directory = support.write_run(tmp_path, PLAN, RECORDS)
    (directory / name).write_text('{"a')
    with pytest.raises(LoadError, match=f"{name} is damaged"):
        analyse(directory)


def test_a_number_that_is_none_is_damage(tmp_path):
    directory = support.write_run(tmp_path, PLAN, RECORDS)
    (directory / "memory.json").write_text("[[0.5, 1], [1.5, NaN]]")
    with pytest.raises(LoadError, match=r"memory\.json is damaged"):
        analyse(directory)
    rewrite(directory / "generator-0.json", cpu=[[0, math.nan]])
    with pytest.raises(LoadError, match=r"generator-0\.json is damaged"):
        analyse(directory)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("locust.json", '{"requests": 1e400, "failures": 0}'),
        ("context.json", '{"cores": NaN}'),
        ("memory.json", f"[[0.5, {10**400}]]"),
        ("peak.json", json.dumps({**PEAK, "bound": "moon"})),
        ("peak.json", json.dumps({**PEAK, "above": []})),
        ("peak.json", json.dumps({**PEAK, "goodput": "1"})),
    ],
)
def test_what_no_run_writes_is_damage(tmp_path, name, content):
    directory = support.write_run(tmp_path, PLAN, RECORDS)
    (directory / name).write_text(content)
    with pytest.raises(LoadError, match=f"{name} is damaged"):
        analyse(directory)


def test_a_counter_that_is_no_number_is_not_counted(tmp_path):
    directory = support.write_run(tmp_path, PLAN, RECORDS)
    for value in ("NaN", "+Inf"):
        text = f'forge_requests_total{{route="/v1/predict",code="200"}} {value}\n'
        (directory / "server-after.prom").write_text(text)
        assert analyse(directory).verdict == "INVALID"


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(LoadError, match="is no directory"):
        analyse(tmp_path / "none")
    with pytest.raises(LoadError, match="is no load plan"):
        analyse(tmp_path)


def test_too_few_samples_are_said_and_not_passed(tmp_path):
    plan = support.plan_of(shape=((1, 1),))
    report = analyse(support.write_run(tmp_path, plan, support.served(plan)))
    assert report.verdict == "INCOMPLETE"
    assert "not measured, too few for p95 (" in table(report)
    assert report.recovery is None


def test_requests_of_unknown_answers_are_said(tmp_path):
    assert "64 of 64 requests without an expected answer" in table(
        analyse(support.write_run(tmp_path, PLAN, RECORDS))
    )


def test_a_peak_that_never_answered_survives_its_file():
    assert peak_from_json(PEAK).probes[0].p95_s == math.inf
