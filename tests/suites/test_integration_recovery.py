"""Integration, scenario_recovery: each scenario goes red when what it recovers from is not met."""

from __future__ import annotations

import shutil

import pytest

from forge_harness.drill.defects import all_defects
from forge_harness.integration import phase4_connector, phase6_preparer, quality_coordinator
from forge_harness.paths import fixtures_dir
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

CHECK = "integration.scenario_recovery"
DEFECTS = [d for d in all_defects().values() if d.check == CHECK]
SOUND = fixtures_dir() / "models" / "v1.0"


def run(run_check, scenario, subject=None):
    return run_check(CHECK, subject or ReferenceSubject(), arguments=("-k", scenario))


def test_the_reference_recovers(run_check):
    found = run_check(CHECK, ReferenceSubject())
    assert (found.outcome, found.reason) == (Outcome.PASS, "")


def test_a_damaged_model_that_loads_is_found(run_check, monkeypatch):
    load = phase4_connector.Phase4Connector.load
    monkeypatch.setattr(
        phase4_connector.Phase4Connector, "load", lambda self, path: load(self, SOUND)
    )
    found = run(run_check, "invalid_model")
    assert found.outcome is Outcome.FAIL
    assert "accepted is 5 models" in found.reason


def test_rotten_content_that_is_returned_is_found(run_check):
    subject = all_defects()["store_never_verifies"].subject()
    found = run(run_check, "corrupted_state", subject)
    assert found.outcome is Outcome.FAIL
    assert "returned is True" in found.reason


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.id)
def test_a_run_that_does_not_recover_is_found(run_check, defect):
    found = run_check(CHECK, defect.subject())
    assert found.outcome is Outcome.FAIL
    assert defect.shows in found.reason


class _OfItsOwn(ReferenceSubject):
    """Tasks, data and errors that the harness does not know."""

    def tasks(self):
        return ("figures",)

    def _known(self, task):
        return "digits" if task == "figures" else task

    def data_info(self, task):
        return super().data_info(self._known(task))

    def data_digest(self, task):
        return super().data_digest(self._known(task))

    def evaluate_package(self, task, path):
        return super().evaluate_package(self._known(task), path)

    def session(self, task, options):
        return super().session(self._known(task), options)

    def save_session(self, session, path):
        try:
            super().save_session(session, path)
        except Exception as error:
            raise RuntimeError(f"unexpected pos 64 vs 0: {error}") from error

    def resume_session(self, task, options, path):
        try:
            return super().resume_session(self._known(task), options, path)
        except Exception as error:
            raise RuntimeError(f"failed reading zip archive: {error}") from error


def test_a_subject_may_refuse_with_errors_of_its_own(run_check):
    """The check was passed by subjects that raised our errors and had our tasks, and no others."""
    found = run_check(CHECK, _OfItsOwn())
    assert (found.outcome, found.reason) == (Outcome.PASS, "")


def test_a_gate_that_lets_everything_through_is_found(run_check, monkeypatch):
    decide = quality_coordinator.QualityCoordinator.evaluate_gate
    monkeypatch.setattr(
        quality_coordinator.QualityCoordinator,
        "evaluate_gate",
        lambda self, name, value, unit="1": decide(self, name, 1.0, unit),
    )
    assert "gate_passed is True" in run(run_check, "gate_failure").reason


def test_an_export_that_refuses_too_late_is_found(run_check, monkeypatch):
    export = phase6_preparer.Phase6Preparer.export

    def leaves(self, source, destination, **options):
        try:
            return export(self, source, destination, **options)
        except Exception:
            shutil.copytree(source, destination.with_name("half-written"))
            raise

    monkeypatch.setattr(phase6_preparer.Phase6Preparer, "export", leaves)
    assert "left_behind is 1" in run(run_check, "gate_failure").reason
    assert "left_behind is 1" in run(run_check, "resource_limits").reason


class _Sharded(ReferenceSubject):
    """Its checkpoints are directories."""

    def save_session(self, session, path):
        path.mkdir(exist_ok=True)
        super().save_session(session, path / "shard-0")

    def resume_session(self, task, options, path):
        return super().resume_session(task, options, path / "shard-0")


def test_a_checkpoint_of_shards_is_torn_too(run_check):
    """A sound subject whose checkpoints are directories was accused by an IsADirectoryError."""
    found = run_check(CHECK, _Sharded())
    assert found.outcome is Outcome.PASS, found.reason
