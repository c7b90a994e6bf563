"""`forge-harness drill suites` as a user runs it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from forge_harness.drill import suites
from forge_harness.drill.kills import (
    UNREACHED,
    DefectResult,
    Status,
    SuitesReport,
    VariantResult,
)

CHECK = "architecture.weight_scale"


def row(name="Q11_absmax_scale", status=Status.KILLED, reason="scale_error is 6289"):
    return DefectResult(
        id=name,
        title="The ternary scale is absmax instead of absmean",
        stage="quantizer",
        source="microsoft/BitNet#383",
        subtlety=2,
        check=CHECK,
        status=status,
        reason=reason,
        outcomes={CHECK: "fail"},
        command=f"forge-harness run --subject forge_harness.drill.defects:{name} --check {CHECK}",
        reference="sha256:a",
        seeded="sha256:b",
        seconds=1.25,
    )


SOUND = VariantResult(
    id="ScaleARow",
    title="One scale a row",
    outcomes={CHECK: "pass"},
    alarms={},
    problem="",
    seconds=2.0,
)
REPORT = SuitesReport(
    defects=[row()],
    variants=[SOUND],
    profile="quick",
    seed=0,
    policy_digest="sha256:0",
    environment={},
    started_at="2026-01-01T00:00:00Z",
    finished_at="2026-01-01T00:00:09Z",
    seconds=9.0,
)


@pytest.fixture
def drill(invoke, monkeypatch):
    """`drill(report, *arguments)`: the command on a drill that ended so."""

    def run(report, *arguments):
        monkeypatch.setattr(suites, "run_suites", lambda *args, **kwargs: report)
        return invoke("drill", "suites", "-q", *arguments)

    return run


def test_kills_are_counted_by_stage_and_suite(drill):
    done = drill(REPORT)
    assert done.exit_code == 0, done.output
    assert "quantizer       1   1  100 % [2, 100]" in done.output
    assert "architecture       1   1  100 % [2, 100]" in done.output
    assert done.output.splitlines()[-1] == (
        "held: 1 of 1 seeded defect killed; 0 false alarms in 1 check of 1 sound subject "
        "(at most 97.5 %) (9 s)"
    )


def test_each_row_can_be_shown(drill):
    assert CHECK not in drill(REPORT).output
    shown = drill(REPORT, "--rows").output
    assert f"Q11_absmax_scale  quantizer  {CHECK}  killed  1.2" in shown


def test_a_survivor_is_named_with_the_command_that_shows_it(drill):
    survivor = row(status=Status.SURVIVED, reason=f"{CHECK} is pass")
    done = drill(replace(REPORT, defects=[row("Q12_sign"), survivor]))
    assert done.exit_code == 1
    assert "survived: Q11_absmax_scale (The ternary scale is absmax" in done.output
    assert (
        f"run --subject forge_harness.drill.defects:Q11_absmax_scale --check {CHECK}" in done.output
    )
    assert "missed: 1 of 2 seeded defects killed" in done.output
    assert " 50 % [1, 99]" in done.output


def test_a_false_alarm_is_named(drill):
    accused = replace(SOUND, alarms={CHECK: "scale_error is 0.3"})
    done = drill(replace(REPORT, variants=[accused]))
    assert done.exit_code == 1
    assert (
        f"false alarm: {CHECK} is red for ScaleARow (One scale a row): scale_error" in done.output
    )


def test_what_was_not_measured_is_not_passed(drill):
    done = drill(replace(REPORT, defects=[row(), row("P11", Status.NOT_MEASURED, "no compiler")]))
    assert done.exit_code == 7
    assert "not measured: P11" in done.output
    assert "no compiler" in done.output
    done = drill(replace(REPORT, variants=[replace(SOUND, problem="took longer than 900 s")]))
    assert done.exit_code == 7
    assert "not measured: ScaleARow (One scale a row): took longer" in done.output


def test_the_matrix_is_written(drill, tmp_path):
    file = tmp_path / "kills.json"
    drill(REPORT, "--json", file)
    document = json.loads(file.read_bytes())
    assert document["schema_version"] == "forge-drill-suites/1"
    assert document["status"] == "held"
    assert document["defects"][0]["outcomes"] == {CHECK: "fail"}
    assert document["false_alarms"]["of"] == 1


def test_an_interrupted_drill_is_shown_and_kept(invoke, monkeypatch, tmp_path):
    left = replace(row("Q12_sign", Status.NOT_MEASURED, UNREACHED), outcomes={})

    def interrupted(*args, stopped, **kwargs):
        stopped(replace(REPORT, defects=[row(), left]))
        raise KeyboardInterrupt

    monkeypatch.setattr(suites, "run_suites", interrupted)
    file = tmp_path / "kills.json"
    done = invoke("drill", "suites", "-q", "--json", file)
    assert done.exit_code == 2
    assert "Not complete: 1 of 3 subjects were not drilled." in done.output
    assert "not measured: 1 of 1 seeded defect killed" in done.output
    assert "Q12_sign" not in done.output
    document = json.loads(file.read_bytes())
    assert (document["is_complete"], document["status"]) == (False, "not measured")


def test_a_file_that_cannot_be_written_is_refused_before_the_drill(invoke, monkeypatch, tmp_path):
    monkeypatch.setattr(suites, "run_suites", lambda *args, **kwargs: pytest.fail("drilled"))
    done = invoke("drill", "suites", "--json", tmp_path)
    assert done.exit_code == 4


def test_the_seeds_are_listed_with_their_sources(invoke):
    done = invoke("drill", "suites", "--list", "--defect", "Q11_absmax_scale")
    assert done.exit_code == 0
    (line,) = (line for line in done.output.splitlines() if line.startswith("Q11"))
    assert CHECK in line
    assert "microsoft/BitNet#383" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--stage", "quantiser"), "Did you mean 'quantizer'?"),
        (("--defect", "Q12_sgn"), "No seeded defect is called 'Q12_sgn'. Did you mean 'Q12_sign'?"),
        (("--jobs", "0"), "0 is not in the range"),
    ],
)
def test_wrong_names_are_refused(invoke, arguments, said):
    done = invoke("drill", "suites", *arguments)
    assert done.exit_code == 4
    assert said in done.stderr


def test_a_drill_from_the_command_line(invoke, tmp_path):
    """The real thing: the check goes red in a process of its own, and says why."""
    file = tmp_path / "kills.json"
    arguments = ("--defect", "Q11_absmax_scale", "--no-variants", "--json", file)
    done = invoke("drill", "suites", *arguments)
    assert done.exit_code == 0, done.output
    (found,) = json.loads(file.read_bytes())["defects"]
    assert found["status"] == "killed"
    assert "scale_error is" in found["reason"]
    assert found["reference"] != found["seeded"]
