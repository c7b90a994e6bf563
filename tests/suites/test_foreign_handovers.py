"""Exports that are not the reference's: no task named, learned slowly, text alone, own readers."""

import json
from dataclasses import replace

import pytest

from forge_harness.formats.manifest import MANIFEST, write_manifest
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome


class NamesNoTask(ReferenceSubject):
    """Its exports are of a family of its own, and name no task."""

    def tasks(self):
        return ("digits",)

    def export_package(self, session, path):
        super().export_package(session, path)
        file = path / "forge.json"
        stated = json.loads(file.read_text())
        stated["model"]["family"] = "figures"
        del stated["extras"]["task"]
        file.write_text(json.dumps(stated))
        (path / MANIFEST).unlink()
        write_manifest(path)


class CalledAsYouLike(ReferenceSubject):
    """Tasks are called as a directory of the check is, and have a slash in their name."""

    def tasks(self):
        return ("digits", "package", "vision/digits")

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found
        own = {"package": "digits", "vision/digits": "digits"}
        return lambda *given, **named: found(
            *(own.get(part, part) if isinstance(part, str) else part for part in given), **named
        )


class LearnsSlowly(ReferenceSubject):
    """Two hundred steps leave it where it began."""

    def session(self, task, options):
        return super().session(task, replace(options, learning_rate=1e-6))


class EvaluatesItsOwn(NamesNoTask):
    """Reads no package that it did not write."""

    def evaluate_package(self, task, path):
        if (path / "lineage.json").exists():
            raise FileNotFoundError(f"{path}/weights.bin")
        return super().evaluate_package(task, path)


class TextAlone(ReferenceSubject):
    """Its only data are said to be text, whose accuracy has no limit."""

    def tasks(self):
        return ("digits",)

    def data_info(self, task):
        return replace(super().data_info(task), kind="tokens")


SINGLE = {
    "transitions.phase5_to_phase6": "test_phase5_to_phase6",
    "transitions.rollback": "test_rollback",
    "transitions.repeat_is_idempotent": "test_repeat_is_idempotent",
    "integration.registry_round_trip": "test_registry_round_trip",
    "integration.scenario_recovery": "test_gate_failure",
}


def run_of(run_check, check, subject):
    """Runs the one function of a check that hands packages over."""
    run = run_check(check, subject, arguments=("-k", SINGLE[check]))
    (item,) = (item for item in run.items if item.nodeid.endswith(f"::{SINGLE[check]}"))
    return item


@pytest.mark.parametrize("check", SINGLE)
def test_an_export_need_not_name_its_task(run_check, check):
    run = run_of(run_check, check, NamesNoTask())
    assert run.outcome is Outcome.PASS, run.reason


@pytest.mark.parametrize(
    "check", ["transitions.phase5_to_phase6", "architecture.state_dict_round_trip"]
)
def test_a_task_may_have_any_name(run_check, check):
    name = SINGLE.get(check, "test_state_dict_round_trip")
    run = run_check(check, CalledAsYouLike(), arguments=("-k", name))
    outcomes = [item.outcome for item in run.items if item.nodeid.endswith(f"::{name}")]
    assert outcomes == [Outcome.PASS], run.reason


@pytest.mark.parametrize("check", [check for check in SINGLE if "registry" not in check])
def test_a_task_that_takes_more_steps_is_not_measured(run_check, check):
    run = run_of(run_check, check, LearnsSlowly())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "after 200 steps, and phase 6 takes nothing below 0.85: name a task" in run.reason


def test_a_subject_of_text_alone_recovers(run_check):
    run = run_of(run_check, "integration.scenario_recovery", TextAlone())
    assert run.outcome is Outcome.PASS, run.reason


@pytest.mark.parametrize("check", ["transitions.rollback", "integration.registry_round_trip"])
def test_an_evaluation_of_its_own_exports_alone_is_named(run_check, check):
    run = run_of(run_check, check, EvaluatesItsOwn())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "FileNotFoundError: PACKAGE/weights.bin); read it by" in run.reason


def test_a_package_that_is_not_ready_for_another_reason_fails(run_check):
    run = run_of(run_check, "transitions.phase5_to_phase6", EvaluatesItsOwn())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "readiness is NOT_READY" in run.reason
    assert "accuracy is not measured" in run.reason
    run = run_of(run_check, "transitions.repeat_is_idempotent", EvaluatesItsOwn())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert [e.value for e in run.evidence if e.name == "same_bytes"] == [True]
