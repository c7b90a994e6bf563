"""Integration, scenario_recovery: each scenario goes red when what it recovers from is not met."""

from __future__ import annotations

import shutil

import pytest

from forge_harness.integration import phase4_connector, phase6_preparer, quality_coordinator
from forge_harness.paths import fixtures_dir
from forge_harness.protocols import StoreSpec
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

CHECK = "integration.scenario_recovery"
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
    class Trusting(ReferenceSubject):
        def state_store(self):
            return StoreSpec(opener="forge_harness.drill.store_mutants:no_check")

    found = run(run_check, "corrupted_state", Trusting())
    assert found.outcome is Outcome.FAIL
    assert "returned is True" in found.reason


class Restarts(ReferenceSubject):
    """Half a checkpoint is taken as none: training starts over."""

    def resume_session(self, task, options, path):
        try:
            return super().resume_session(task, options, path)
        except Exception:
            return self.session(task, options)


class ForgetsMomentum(ReferenceSubject):
    def resume_session(self, task, options, path):
        session = super().resume_session(task, options, path)
        session.optimizer.state.clear()
        return session


@pytest.mark.parametrize(
    ("subject", "reason"),
    [(Restarts, "torn_accepted is True"), (ForgetsMomentum, "losses_equal is False")],
)
def test_training_that_resumes_from_nothing_is_found(run_check, subject, reason):
    found = run(run_check, "failed_training", subject())
    assert found.outcome is Outcome.FAIL
    assert reason in found.reason


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


class SavesInPlace(ReferenceSubject):
    """Writes over the old checkpoint instead of beside it."""

    def save_session(self, session, path):
        if path.exists():
            path.write_bytes(bytes(1 << 16))
        else:
            super().save_session(session, path)


def test_a_checkpoint_written_in_place_is_found(run_check):
    found = run(run_check, "resource_limits", SavesInPlace())
    assert found.outcome is Outcome.FAIL
    assert "checkpoint_kept is False" in found.reason
