"""Drilling the suites: what is run for which defect, and the real thing once."""

import json
from types import SimpleNamespace

import pytest

from forge_harness.drill import defects as registry
from forge_harness.drill import suites
from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.drill.kills import UNREACHED, Status
from forge_harness.drill.suites import Selection, run_suites, selected
from forge_harness.drill.workers import Ended
from forge_harness.errors import UsageError
from forge_harness.policy import load_policy
from forge_harness.types import Profile

SCALE, ROUNDING = "architecture.weight_scale", "architecture.weight_rounding"


def seed(name, check=SCALE, stage=Stage.QUANTIZER):
    fields = {"title": name, "stage": stage, "check": check, "shows": "scale_error"}
    return Defect(id=name, subject=object, alive=repr, **fields)


KINDS = {
    "rows": Benign(id="rows", title="rows", subject=object, checks=("architecture",)),
    "round": Benign(id="round", title="round", subject=object, checks=(ROUNDING,)),
}


@pytest.fixture
def drilled(monkeypatch):
    """`drilled(seeds, answers, ...)`: a report of drills that end as told, and the tasks."""

    def drilling(seeds, answers=None, selection=None, profile="quick", forge_seed=0, **options):
        tasks = []

        def side_by_side(work, given, **how):
            tasks.extend(given)
            # As processes end: in no order.
            for index, task in reversed(list(enumerate(given))):
                answer = (answers or {}).get(task.name)
                if isinstance(answer, KeyboardInterrupt):
                    raise answer
                if isinstance(answer, str):
                    yield Ended(index, None, answer, 1.0)
                    continue
                found = {check: ("pass", "") for check in task.checks}
                alive = {"reference": "sha256:a", "seeded": "sha256:b"} if task.defect else {}
                yield Ended(index, {"found": found, **alive} | (answer or {}), "", 1.0)

        monkeypatch.setattr(registry, "all_defects", lambda: {d.id: d for d in seeds})
        monkeypatch.setattr(registry, "all_benign", lambda: KINDS)
        monkeypatch.setattr(suites, "side_by_side", side_by_side)
        report = run_suites(selection, profile=profile, seed=forge_seed, **options)
        return SimpleNamespace(report=report, tasks={task.name: task for task in tasks})

    return drilling


RED = {"found": {SCALE: ("fail", "scale_error is 3")}}


def test_a_defect_runs_the_check_that_must_see_it(drilled):
    found = drilled([seed("one")], {"one": RED})
    assert found.tasks["one"].checks == (SCALE,)
    assert found.tasks["reference"].checks == (SCALE,)
    assert [row.status for row in found.report.defects] == [Status.KILLED]
    assert found.report.status == "held"


def test_the_matrix_runs_the_suite_and_trains_no_study(drilled):
    found = drilled([seed("one")], {"one": RED}, Selection(matrix=True))
    policy = load_policy()
    suite = {e.id for e in policy.in_scope(Profile.QUICK) if e.suite == "architecture"}
    assert set(found.tasks["one"].checks) == suite
    trained = drilled([seed("two", "training.schedule_trace")], {}, Selection(matrix=True))
    assert "training.convergence_rate" not in trained.tasks["two"].checks
    assert "training.clip_effective" in trained.tasks["two"].checks


def test_sound_subjects_run_what_they_are_sound_for(drilled):
    found = drilled([seed("one"), seed("two", ROUNDING)])
    assert found.tasks["rows"].checks == (ROUNDING, SCALE)
    assert found.tasks["round"].checks == (ROUNDING,)
    assert "round" not in drilled([seed("one")]).tasks
    assert set(drilled([seed("one")], selection=Selection(variants=False)).tasks) == {
        "reference",
        "one",
    }


def test_what_cannot_be_measured_for_a_sound_subject_is_left_out(drilled, monkeypatch):
    but = Benign(id="rows", title="", subject=object, checks=("architecture",), but=(SCALE,))
    monkeypatch.setitem(KINDS, "rows", but)
    assert drilled([seed("one"), seed("two", ROUNDING)]).tasks["rows"].checks == (ROUNDING,)


def test_what_was_not_measured_on_a_sound_subject_is_told(drilled):
    skipped = {"found": {SCALE: ("not_measured", "no disk")}}
    assert drilled([seed("one")], {"one": RED, "rows": skipped}).report.status == "not measured"


def test_an_observable_that_raises_for_the_reference_proves_nothing(drilled):
    """A full disk: both raise, or only the reference does."""
    for seeded in ("raised OSError", "sha256:b"):
        answer = {**RED, "reference": "raised OSError", "seeded": seeded}
        (row,) = drilled([seed("one")], {"one": answer}).report.defects
        assert row.status is Status.NOT_MEASURED
        assert "raised OSError for the subject it is seeded in" in row.reason


def test_a_project_s_own_subject_is_not_the_reference(tmp_path, monkeypatch):
    """What forge.toml and the environment name is the user's; the seeds are in the reference."""
    (tmp_path / "forge.toml").write_text('[run]\nsubject = "nothing.here:Mine"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_HARNESS_DECLARED_CAUSAL_MODELS", "none")
    task = suites._Task("reference", ("architecture.causal_mask",), False, "quick")
    assert suites.drill(task)["found"] == {"architecture.causal_mask": ("pass", "")}


def test_a_defect_that_changes_nothing_is_no_kill(drilled):
    same = {**RED, "reference": "sha256:a", "seeded": "sha256:a"}
    report = drilled([seed("one")], {"one": same}).report
    assert report.defects[0].status is Status.EQUIVALENT
    assert report.status == "missed"


def test_a_process_that_dies_is_a_crash(drilled):
    report = drilled([seed("one")], {"one": "the process ended with status -11"}).report
    assert report.defects[0].status is Status.CRASHED
    assert "status -11" in report.defects[0].reason


def test_a_reference_that_dies_leaves_nothing_measured(drilled):
    report = drilled([seed("one")], {"one": RED, "reference": "out of memory"}).report
    assert report.defects[0].status is Status.NOT_MEASURED
    assert report.variants[0].problem == "out of memory"
    assert report.status == "not measured"


def test_a_red_check_of_a_sound_subject_is_a_false_alarm(drilled):
    report = drilled([seed("one")], {"one": RED, "rows": RED}).report
    assert report.alarms == 1
    assert report.status == "missed"
    assert [v.id for v in report.variants if v.alarms] == ["rows"]


def test_a_check_without_a_record_was_not_measured_on_a_sound_subject(drilled):
    report = drilled([seed("one")], {"one": RED, "rows": {"found": {}}}).report
    assert report.status == "not measured"
    assert next(v for v in report.variants if v.id == "rows").problem == f"no record of {SCALE}"


def test_a_check_outside_the_profile_is_not_measured(drilled):
    everywhere = {e.id for e in load_policy().in_scope(Profile.FULL)}
    quick = {e.id for e in load_policy().in_scope(Profile.QUICK)}
    outside = sorted(everywhere - quick)[0]
    found = drilled([seed("one", outside)])
    assert found.tasks["one"].checks == ()
    assert found.report.defects[0].status is Status.NOT_MEASURED


def test_rows_are_in_the_order_of_the_registry(drilled):
    names = ["c", "a", "b"]
    report = drilled([seed(name) for name in names]).report
    assert [row.id for row in report.defects] == names


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (Selection(), ["one", "two", "three"]),
        (Selection(stages=("data",)), ["three"]),
        (Selection(checks=(SCALE,)), ["one"]),
        (Selection(suites=("architecture",)), ["one", "two"]),
        (Selection(ids=("one", "three")), ["one", "three"]),
        (Selection(stages=("quantizer",), checks=(ROUNDING,)), ["two"]),
    ],
)
def test_selections(monkeypatch, selection, names):
    seeds = [seed("one"), seed("two", ROUNDING), seed("three", "data.balance", Stage.DATA)]
    monkeypatch.setattr(registry, "all_defects", lambda: {d.id: d for d in seeds})
    assert [defect.id for defect in selected(selection)] == names


def test_a_sample_is_drawn_of_each_stage_by_the_seed(monkeypatch):
    stages = (Stage.QUANTIZER, Stage.DATA)
    seeds = [seed(f"{stage}{i}", stage=stage) for stage in stages for i in range(20)]
    monkeypatch.setattr(registry, "all_defects", lambda: {d.id: d for d in seeds})

    def drawn(size, by=0):
        return [d.id for d in selected(Selection(sample=size), by)]

    assert [sum(name.startswith(stage) for name in drawn(3)) for stage in stages] == [3, 3]
    assert drawn(3) == drawn(3) == sorted(drawn(3), key=[d.id for d in seeds].index)
    assert len({tuple(drawn(3, by)) for by in range(20)}) == 20
    assert drawn(99) == [d.id for d in seeds]
    assert [d.id for d in selected(Selection(stages=("data",), sample=3))] == drawn(3)[3:]


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        (Selection(stages=("quantiser",)), "Did you mean 'quantizer'"),
        (Selection(ids=("Q11_absmax",)), "Did you mean 'Q11_absmax_scale'"),
        (Selection(suites=("gates",)), "Unknown suite of seeded defects 'gates'"),
        (Selection(stages=("quantizer",), suites=("data",)), "give fewer"),
    ],
)
def test_a_selection_of_nothing_is_refused(selection, said):
    with pytest.raises(UsageError, match=said):
        run_suites(selection)


def test_a_seed_of_a_check_that_is_not_there_is_refused(drilled):
    with pytest.raises(
        UsageError, match=r"'one'.*Did you mean 'architecture.weight_scale'.*--suite"
    ):
        drilled([seed("one", "architecture.weight_scal")])


def test_the_command_has_the_seed_and_the_profile_the_check_was_run_with(drilled):
    (row,) = drilled([seed("one")], {"one": RED}).report.defects
    assert row.command.endswith(f"defects:one --check {SCALE}")
    found = drilled([seed("one")], {"one": RED}, profile="full", forge_seed=7)
    assert found.report.defects[0].command.endswith(
        f"defects:one --profile full --seed 7 --check {SCALE}"
    )


def test_an_interrupted_drill_hands_over_what_it_found(drilled):
    """The sound subject that comes first is the one not reached: nothing held for it."""
    seeds = [seed("one"), seed("two", ROUNDING)]
    red = {"one": RED, "rows": KeyboardInterrupt()}
    found = []
    with pytest.raises(KeyboardInterrupt):
        drilled(seeds, red, stopped=found.append)
    (report,) = found
    assert [row.status for row in report.defects] == [Status.NOT_MEASURED] * 2
    problems = {row.id: row.problem for row in report.variants}
    assert problems == {"reference": UNREACHED, "rows": UNREACHED, "round": ""}
    assert report.status == "not measured"
    assert report.unreached == 2
    assert report.to_json()["is_complete"] is False


def test_a_drill_of_one_subject_in_this_process():
    """What a worker does: digests of both, and how the check ended."""
    found = suites.drill(suites._Task("Q11_absmax_scale", (SCALE,), True, "quick"))
    assert found["reference"] != found["seeded"]
    outcome, reason = found["found"][SCALE]
    assert outcome == "fail"
    assert reason.startswith("scale_error is")
    sound = suites.drill(suites._Task("reference", (SCALE,), False, "quick"))
    assert sound == {"found": {SCALE: ("pass", "")}}


def test_the_real_thing():
    """One defect in a real drill, all checks of its suite: killed by its own, and documented."""
    report = run_suites(Selection(ids=("Q12_sign",), matrix=True, variants=False))
    (row,) = report.defects
    assert row.status is Status.KILLED, row.reason
    assert report.status == "held"
    assert row.reference != row.seeded
    assert row.outcomes[row.check] == "fail"
    assert row.outcomes["architecture.causal_mask"] == "pass"
    assert report.variants[0].outcomes[row.check] == "pass"
    document = json.loads(json.dumps(report.to_json()))
    assert document["power"] == {"name": "all", "killed": 1, "of": 1, "low": 0.025, "high": 1.0} | {
        "low": document["power"]["low"]
    }
    assert document["defects"][0]["command"].endswith(
        f"--subject forge_harness.drill.defects:Q12_sign --check {row.check}"
    )
