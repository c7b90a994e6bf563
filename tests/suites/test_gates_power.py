"""The check that measures the checks: red for a survivor, a crash, a false alarm, a dead seed."""

import json

import pytest

from forge_harness.drill import suites
from forge_harness.drill.defects import all_defects
from forge_harness.drill.workers import Ended
from forge_harness.types import Outcome

CHECK = "gates.seeded_defects_found"


@pytest.fixture
def drilled(monkeypatch):
    """`drilled(change)`: drills end as they should, but for what `change(task, answer)` does."""

    def patch(change=lambda task, answer: answer):
        def side_by_side(work, tasks, **options):
            for index, task in enumerate(tasks):
                found = {check: ("pass", "") for check in task.checks}
                answer = {"found": found}
                if task.defect:
                    defect = all_defects()[task.name]
                    answer |= {"reference": "sha256:a", "seeded": "sha256:b"}
                    found[defect.check] = ("fail", f"{defect.shows} is 3, expected 0")
                answer = change(task, answer)
                problem = answer if isinstance(answer, str) else ""
                yield Ended(index, None if problem else answer, problem, 1.0)

        monkeypatch.setattr(suites, "side_by_side", side_by_side)

    return patch


def test_kills_are_green(run_check, drilled):
    drilled()
    run = run_check(CHECK)
    assert run.outcome is Outcome.PASS, run.reason
    assert run.evidence("seeded") == run.evidence("killed") == 9


def first(*, defect):
    """Returns whether a task is the first over a defect, or over the reference subject."""
    seen = []

    def is_it(task):
        if task.defect is defect:
            seen.append(task)
        return seen == [task]

    return is_it


def survives(task, answer):
    return answer | {"found": {check: ("pass", "") for check in task.checks}}


def crashes(task, answer):
    return answer | {"found": {check: ("error", "TypeError: no") for check in task.checks}}


def says_something_else(task, answer):
    return answer | {"found": {check: ("fail", "it is wet") for check in task.checks}}


def changes_nothing(task, answer):
    return answer | {"seeded": "sha256:a"}


def dies(task, answer):
    return "the process ended with status -9"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (survives, "survived: "),
        (crashes, "crashed: TypeError: no"),
        (says_something_else, "other reason: it is wet"),
        (changes_nothing, "equivalent: "),
        (dies, "crashed: The process of the drill"),
    ],
)
def test_a_seed_that_is_not_killed_is_red(run_check, drilled, what, said):
    is_first = first(defect=True)
    drilled(lambda task, answer: what(task, answer) if is_first(task) else answer)
    run = run_check(CHECK)
    assert run.outcome is Outcome.FAIL
    assert run.reason.startswith("missed is 1 defects, expected 0")
    assert said in run.reason


def test_a_check_that_is_red_for_the_reference_is_red(run_check, drilled):
    is_first = first(defect=False)
    drilled(lambda task, answer: says_something_else(task, answer) if is_first(task) else answer)
    run = run_check(CHECK)
    assert run.outcome is Outcome.FAIL
    assert "false_alarms is " in run.reason


def test_what_could_not_be_drilled_is_not_measured(run_check, drilled):
    def unmeasured(task, answer):
        return {**answer, "found": {check: ("not_measured", "no disk") for check in task.checks}}

    is_first = first(defect=True)
    drilled(lambda task, answer: unmeasured(task, answer) if is_first(task) else answer)
    run = run_check(CHECK)
    assert run.outcome is Outcome.NOT_MEASURED
    assert "no disk" in run.reason


def test_nothing_that_could_be_drilled_is_not_measured(run_check, drilled):
    drilled(lambda task, answer: dies(task, answer) if not task.defect else answer)
    run = run_check(CHECK)
    assert run.outcome is Outcome.NOT_MEASURED
    assert "not measured: For the reference subject" in run.reason


def test_a_sound_subject_that_died_is_named(run_check, drilled):
    def ended(task, answer):
        return dies(task, answer) if task.name == "layer_norms_with_bias" else answer

    drilled(ended)
    run = run_check(CHECK, profile="nightly")
    assert run.outcome is Outcome.NOT_MEASURED
    assert "layer_norms_with_bias: the process ended with status -9" in run.reason


def test_the_matrix_is_kept(run_check, drilled, tmp_path):
    drilled()
    run = run_check(CHECK, arguments=("--forge-run-dir", str(tmp_path / "run")))
    digest = run.evidence("kill_matrix").removeprefix("sha256:")
    matrix = json.loads((tmp_path / "run" / "evidence" / "sha256" / digest).read_text())
    assert len(matrix["defects"]) == 9
    assert all(row["status"] == "killed" for row in matrix["defects"])


@pytest.mark.parametrize(("profile", "size"), [("quick", 1), ("full", 2), ("nightly", None)])
def test_larger_profiles_seed_more(run_check, drilled, profile, size):
    drilled()
    run = run_check(CHECK, profile=profile)
    assert run.outcome is Outcome.PASS, run.reason
    every = all_defects().values()
    stages = {d.stage for d in every}
    expected = {1: 9, 2: sum(min(2, sum(d.stage is s for d in every)) for s in stages)}
    assert run.evidence("seeded") == expected.get(size, len(every))
    accused = next(e for e in run.items[0].evidence if e.name == "false_alarms")
    assert accused.reason.startswith("of ")
