"""GitHub's limits: ten annotations a kind, a summary under 1 MiB, escapes."""

from dataclasses import replace
from shutil import copytree

import pytest

from forge_harness.cli.github import MAX_SUMMARY_BYTES, annotation_commands, append_summary, cut
from forge_harness.rundir import RunDirectory, read_items, read_policy, read_record
from forge_harness.scoring import assemble, context_of

MANY = tuple((f"data.c{n:02}", "high") for n in range(13))


def commands(run, kind):
    found = annotation_commands(read_record(run))
    return [command for command in found if command.startswith(f"::{kind} ")]


@pytest.mark.parametrize(("bad", "shown"), [(0, 0), (1, 1), (10, 10), (11, 10), (13, 10)])
@pytest.mark.parametrize(("outcome", "kind"), [("fail", "error"), ("not_measured", "warning")])
def test_at_most_ten_a_kind_and_the_last_counts_the_rest(run_of, bad, shown, outcome, kind):
    outcomes = {f"c{n:02}": outcome for n in range(bad)}
    found = commands(run_of(checks=MANY, **outcomes), kind)
    assert len(found) == shown
    if bad > shown:
        assert found[-1] == (
            f"::{kind} title={bad - 9} more::{bad - 9} more of this kind; see the report."
        )


def test_the_severest_come_first(run_of):
    checks = (("data.low", "low"), ("data.high", "high"), ("data.worst", "critical"))
    run = run_of(checks=checks, low="fail", high="fail", worst="error")
    assert [line.split(" ")[1] for line in commands(run, "error")] == [
        "title=data.worst",
        "title=data.high",
    ]
    assert len(commands(run, "warning")) == 1


def test_a_medium_check_that_was_not_measured_is_no_annotation(run_of):
    assert annotation_commands(read_record(run_of(gamma=None))) == []


def test_a_test_outside_the_catalogue_is_an_error(run_of, make):
    from forge_harness.record import RunRecord

    record = read_record(run_of())
    stray = make.item("data.stray", "pass")
    changed = RunRecord.model_validate(
        record.model_dump() | {"unscored_items": [stray.model_dump()]}
    )
    assert "title=data.stray::" in annotation_commands(changed)[0]


def test_what_a_check_says_hides_nothing_of_an_annotation(run_of):
    """A bidirectional override shows a failing value as a passing one; NUL ends some readers."""
    record = read_record(run_of(alpha="fail"))
    said = "loss \u202e9.0\x00, 50 %\r\nsecond\x1b[2J"
    checks = [
        check.model_copy(update={"reason": said}) if check.id == "data.alpha" else check
        for check in record.checks
    ]
    (command,) = annotation_commands(record.model_copy(update={"checks": checks}))
    assert command.isprintable()
    assert command.endswith(r"::loss \u202e9.0\x00, 50 %25%0Asecond\x1b[2J")


def test_a_module_that_could_not_be_collected_says_why(run_of, make):
    record = read_record(run_of())
    broken = make.item("unknown", "error").model_copy(update={"reason": "could not be collected"})
    (command,) = annotation_commands(record.model_copy(update={"unscored_items": [broken]}))
    assert command.endswith(": could not be collected")


def test_a_module_that_skipped_itself_is_an_error_that_says_so(run_of, make):
    record = read_record(run_of())
    why = "skipped itself whole: no GPU"
    hidden = make.item("unknown", "not_measured").model_copy(update={"reason": why})
    (command,) = annotation_commands(record.model_copy(update={"unscored_items": [hidden]}))
    assert command.startswith("::error title=unknown::")
    assert command.endswith(why)


def test_text_is_escaped_as_the_runner_reads_it(run_of):
    record = read_record(run_of(beta="fail"))
    check = record.checks[1].model_copy(update={"reason": "50 %\nof: it, yes"})
    changed = record.model_copy(update={"checks": [check]})
    assert annotation_commands(changed) == [
        "::error title=data.beta (high)%3A fail::50 %25%0Aof: it, yes"
    ]


@pytest.mark.parametrize("limit", [200, 1000, 5000])
def test_a_long_summary_is_cut_at_a_line_and_says_so(limit):
    text = "".join(f"| čheck {n} | fail |\n" for n in range(1000))
    short = cut(text, limit)
    assert len(short.encode()) <= limit
    assert "Cut here" in short
    kept = short.partition("\n\nCut here")[0]
    assert text.startswith(kept + "\n")
    assert cut("short", limit) == "short"


def test_what_earlier_steps_wrote_counts(tmp_path):
    target = tmp_path / "summary.md"
    target.write_text("x" * (MAX_SUMMARY_BYTES - 1000), encoding="utf-8")
    append_summary("line\n" * 1000, {"GITHUB_STEP_SUMMARY": str(target)})
    assert target.stat().st_size <= MAX_SUMMARY_BYTES
    append_summary("ignored", {})


def forged(run, **changed):
    """Seals a run again with another id and policy, as anybody can who makes runs."""
    record, policy = read_record(run), read_policy(run)
    limits = policy.thresholds | {"gates.::error::x.at_least": 1.0}
    units = {"gates.::error::x": "1"}
    policy = policy.model_copy(update={"thresholds": limits, "units": units})
    context = replace(context_of(record), run_id="::error::id")
    directory = RunDirectory.open_existing(run)
    again = assemble(policy, read_items(run), scope=record.scope, context=context)
    directory.write_final(again, policy)
    directory.seal()
    return run


def test_no_name_in_a_run_is_a_command_to_the_runner(invoke, measured, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir()
    good = forged(measured()).rename(kept / "good")
    damaged = kept / "::error::damaged"
    copytree(good, damaged)
    (damaged / "items.jsonl").write_text("")
    notes = tmp_path / "p.toml"
    notes.write_text("[thresholds.gates]\naccuracy.at_least = 0.9\n")
    monkeypatch.chdir(kept)
    for command in (
        ("history", "show", "."),
        ("history", "rescore", ".", "--policy", str(notes)),
        ("compare", "good", "good"),
    ):
        result = invoke(*command)
        assert "error::" in result.output, command
        obeyed = [line for line in result.output.splitlines() if line.lstrip().startswith("::")]
        assert not obeyed, command
