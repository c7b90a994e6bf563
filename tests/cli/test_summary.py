"""The summary: verdict, interval, scope, suites, what is missing, where the report is."""

from pathlib import Path

import pytest

from forge_harness.cli.summary import MEANINGS, percent, score_sentence, suite_table, summary
from forge_harness.errors import ExitCode
from forge_harness.rundir import read_policy, read_record


def test_everything_a_reader_needs_is_there(run_of):
    run = run_of(alpha=None, beta="fail", gamma="warn")
    record = read_record(run)
    page = run / "report.html"
    written = [run / "report.md", page]
    lines = summary(record, read_policy(run), run, written, ExitCode.GATE_FAILED).splitlines()
    assert lines[1] == "FAIL, quick scope: 4 of 4 checks"
    assert lines[2] == (
        f"Integration score {record.score.low} (at most {record.score.high}), "
        f"{percent(record.coverage)} measured"
    )
    assert "  - high check data.beta failed: why fail" in lines
    header = next(line for line in lines if line.startswith("suite"))
    assert header == "suite     weight  score  measured  pass  warn  fail  not measured   time"
    assert "Not measured: 1 check (1 critical)." in lines
    assert f"Report: {page}" in lines
    assert lines[-1] == "Exit code 1: gate failed."


def test_a_run_without_a_page_names_its_directory(run_of):
    run = run_of()
    record = read_record(run)
    text = summary(record, read_policy(run), run, [], ExitCode.PASS)
    assert f"Run: {run}" in text
    assert f"No space was left for the reports: free some, and `forge-harness report {run}`" in text
    assert "Not measured" not in text
    assert text.endswith("Exit code 0: pass.")
    written = [run / "report.md"]
    assert "No space" not in summary(record, read_policy(run), run, written, ExitCode.PASS)


def test_python_warnings_are_counted_by_check(run_of):
    run = run_of()
    record = read_record(run)
    assert "Python warnings" not in summary(record, read_policy(run), run, [], ExitCode.PASS)
    checks = list(record.checks)
    for index, words in ((1, ["UserWarning: one\x1b (a.py:3)", "UserWarning: two"]), (2, ["C"])):
        items = [item.model_copy(update={"warnings": words}) for item in checks[index].items]
        checks[index] = checks[index].model_copy(update={"items": items})
    record = record.model_copy(update={"checks": checks})
    lines = summary(record, read_policy(run), run, [], ExitCode.PASS).splitlines()
    (line,) = [line for line in lines if line.startswith("Python warnings in")]
    assert line.startswith("Python warnings in 2 checks, kept with them; the first: UserWarning:")
    assert "\x1b" not in line


def test_checks_that_did_not_end_in_time_name_the_way_out(run_of):
    run = run_of()
    record = read_record(run)
    assert "Timed out" not in summary(record, read_policy(run), run, [], ExitCode.PASS)
    checks = [
        check.model_copy(update={"reason": f"timed out after 120 s{more}"})
        for check, more in zip(record.checks, ("", " and could not be stopped"), strict=False)
    ]
    record = record.model_copy(update={"checks": [*checks, *record.checks[2:]]})
    lines = summary(record, read_policy(run), run, [], ExitCode.PASS).splitlines()
    (line,) = [line for line in lines if line.startswith("Timed out: 2 checks. --timeout SECONDS")]
    assert "first task" in line


def test_at_most_five_reasons(run_of):
    checks = tuple((f"data.c{n}", "high") for n in range(8))
    run = run_of(checks=checks, **{f"c{n}": "fail" for n in range(8)})
    text = summary(read_record(run), read_policy(run), Path("run"), [], ExitCode.GATE_FAILED)
    assert text.count(" failed: ") == 5
    assert "  - and 3 more" in text


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.8999, "89 %"), (0.29, "29 %"), (0.57, "57 %"), (1.0, "100 %"), (0.0, "0 %")],
)
def test_shares_are_floored(share, shown):
    assert percent(share) == shown


def test_every_exit_code_has_its_words():
    assert set(MEANINGS) == set(ExitCode)


def test_the_score_is_an_interval(run_of):
    assert score_sentence(read_record(run_of())) == (
        "Integration score 100 (at most 100), 100 % measured"
    )


def test_a_suite_without_a_check_that_applies_has_no_number(run_of):
    (suite,) = read_record(run_of()).suites[:1]
    none = suite.model_copy(update={"counts": {"not_applicable": 2}, "low": 0, "high": 0})
    row = suite_table([none]).splitlines()[-1].split()
    assert row[:4] == [suite.name, str(suite.weight), "n/a", "n/a"]
    some = suite.model_copy(update={"counts": {"not_applicable": 2, "pass": 1}})
    assert suite_table([some]).splitlines()[-1].split()[2:4] == ["100", "100"]
