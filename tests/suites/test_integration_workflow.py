"""Integration, scenario_workflow and registry_round_trip: red where the chain is broken."""

from __future__ import annotations

import shutil

import pytest

from forge_harness.integration import (
    experiments,
    mlops_coordinator,
    phase6_preparer,
    pipeline_validator,
    quality_coordinator,
    state_manager,
)
from forge_harness.model import ByteLM, ByteLMConfig
from forge_harness.protocols import TrainOptions
from forge_harness.subject.checkpoint import CheckpointSubject
from forge_harness.training import train_to_directory
from forge_harness.types import Outcome

WORKFLOW, REGISTRY = "integration.scenario_workflow", "integration.registry_round_trip"


@pytest.mark.parametrize("check", [WORKFLOW, REGISTRY])
def test_the_components_pass(run_check, check):
    run = run_check(check)
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The package of a small language model, as `forge-harness train` writes it."""
    out = tmp_path_factory.mktemp("text") / "run"
    config = ByteLMConfig(width=128, heads=2, hidden=512, layers=1)
    options = TrainOptions(steps=4, batch_size=2)
    train_to_directory("bytes", out, options, build_model=lambda *_: ByteLM(config))
    return out / "package"


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """Where the run of the first chain is kept, and its plan and record once there are any."""
    return tmp_path_factory.mktemp("validated") / "run", []


@pytest.fixture
def validated_once(monkeypatch, validated):
    """For defects elsewhere in the chain: its validation, three processes, is done once."""
    kept, found = validated
    validate = pipeline_validator.PipelineValidator.validate

    def remembered(self, run_dir, progress=None):
        if not found:
            record = validate(self, run_dir, progress)
            shutil.copytree(run_dir, kept)
            found.extend((self.plan(), record))
        else:
            self._plan = found[0]
            shutil.copytree(kept, run_dir)
        return found[1]

    monkeypatch.setattr(pipeline_validator.PipelineValidator, "validate", remembered)


@pytest.mark.usefixtures("validated_once")
@pytest.mark.parametrize("check", [WORKFLOW, "transitions.phase4_to_phase5"])
def test_a_language_model_passes(run_check, text, check):
    """Its accuracy was held to the limit of classifiers, its start refused for an ulp or two."""
    run = run_check(check, CheckpointSubject(text))
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


def steps_lost(patch):
    add = experiments.StepLog.add
    patch.setattr(
        experiments.StepLog, "add", lambda self, r, n: add(self, r, n) if r.step % 2 else None
    )


def gate_open(patch):
    decide = quality_coordinator.QualityCoordinator.evaluate_gate
    patch.setattr(
        quality_coordinator.QualityCoordinator,
        "evaluate_gate",
        lambda self, name, value, unit="1": decide(self, name, 0.1, unit),
    )


def lineage_and_parents_lost(patch):
    export = phase6_preparer.Phase6Preparer.export
    patch.setattr(
        phase6_preparer.Phase6Preparer,
        "export",
        lambda self, source, target, lineage=None: export(self, source, target),
    )
    new = state_manager.NewState
    patch.setattr(
        state_manager, "NewState", lambda **fields: new(**{**fields, "parents": ("another",)})
    )


def wrong_lineage_and_quality(patch):
    write = phase6_preparer._write
    zeros = "sha256:" + "0" * 64
    wrong = {"source_digest": zeros, "data_digest": zeros, "quality_score": 0.9999}
    patch.setattr(
        phase6_preparer,
        "_write",
        lambda path, value: write(path, {k: wrong.get(k, v) for k, v in value.items()}),
    )


@pytest.mark.usefixtures("validated_once")
@pytest.mark.parametrize(
    ("defect", "reasons"),
    [
        (
            wrong_lineage_and_quality,
            ["names other weights", "names other data", "describes another quality"],
        ),
        (steps_lost, ["steps_tracked is 60 steps"]),
        (gate_open, ["gate is False"]),
        (
            lineage_and_parents_lost,
            ["lineage names another source", "the migrated state names another parent"],
        ),
    ],
)
def test_a_broken_chain_is_found(run_check, monkeypatch, defect, reasons):
    defect(monkeypatch)
    run = run_check(WORKFLOW)
    assert run.outcome is Outcome.FAIL
    for reason in reasons:
        assert reason in run.reason


def takes_damaged(patch):
    patch.setattr(mlops_coordinator, "verify_manifest", lambda package: None)


class Unequal(str):
    """A digest that never differs from another."""

    def __ne__(self, other):
        return False

    __eq__ = str.__eq__
    __hash__ = str.__hash__


def gives_out_anything(patch):
    digest = mlops_coordinator.tree_digest
    patch.setattr(mlops_coordinator, "tree_digest", lambda path: Unequal(digest(path)))


def mixes_versions_up(patch):
    stored = experiments.Tracker.stored
    patch.setattr(experiments.Tracker, "stored", lambda self, name, number: stored(self, name, 1))
    for module in (mlops_coordinator, experiments):
        patch.setattr(module, "tree_digest", lambda path: "sha256:" + "0" * 64)


@pytest.mark.parametrize(
    ("defect", "reason"),
    [
        (takes_damaged, "refused is 1 packages, expected 2"),
        (gives_out_anything, "changed_given_out is True"),
        (mixes_versions_up, "differences is"),
    ],
)
def test_a_careless_registry_is_found(run_check, monkeypatch, defect, reason):
    defect(monkeypatch)
    run = run_check(REGISTRY)
    assert run.outcome is Outcome.FAIL
    assert reason in run.reason
