"""Transitions to phase 6: each check goes red for a preparer with one seeded defect."""

from __future__ import annotations

import json
import shutil
from functools import cache

import pytest

from forge_harness.drill.defects import defects_of
from forge_harness.integration import baking_manifest, fleet, phase6_preparer, readiness
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome


class Packer:
    """A subject that these checks can say nothing about."""

    name = "packer"

    def pack(self, codes): ...
    def unpack(self, packed, rows): ...


@pytest.fixture(scope="module")
def _train_member():
    return cache(fleet.train_member)


@pytest.fixture
def fleet_trained_once(monkeypatch, _train_member):
    """For tests of what is made of the fleet; its members are exported for each of them."""
    monkeypatch.setattr(fleet, "train_member", _train_member)


CHECKS = ("phase4_to_phase5", "phase5_to_phase6", "rollback", "repeat_is_idempotent")


@pytest.mark.usefixtures("fleet_trained_once")
@pytest.mark.parametrize("check", CHECKS)
def test_the_reference_passes(run_check, check):
    run = run_check(f"transitions.{check}", ReferenceSubject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


@pytest.mark.parametrize("check", CHECKS)
def test_a_subject_that_hands_nothing_over_is_not_measured(run_check, check):
    run = run_check(f"transitions.{check}", Packer())
    assert run.outcome is Outcome.NOT_MEASURED
    assert "does not offer" in run.reason


@pytest.mark.parametrize("defect", defects_of("transitions"), ids=lambda d: d.id)
def test_a_subject_that_hands_over_what_is_not_so_is_found(run_check, defect):
    name = f"test_{defect.check.removeprefix('transitions.')}"
    run = run_check(defect.check, defect.subject(), arguments=("-k", name))
    assert run.outcome is Outcome.FAIL
    assert defect.shows in run.reason


def claims_copied(patch):
    """Metrics are what somebody says, not what the files give, and nobody compares."""
    real = phase6_preparer._write

    def write(path, value):
        if path.name == "metrics.json":
            value = {name: {**entry, "value": 0.999} for name, entry in value.items()}
        real(path, value)

    patch.setattr(phase6_preparer, "_write", write)
    patch.setattr(readiness, "CLAIM_TOLERANCE", 9.0)


def lineage_dropped(patch):
    real = phase6_preparer._write

    def write(path, value):
        if path.name == "lineage.json":
            value = {k: v for k, v in value.items() if k != "data_digest"}
        real(path, value)

    patch.setattr(phase6_preparer, "_write", write)


def total_without_manifests(patch):
    total = property(
        lambda m: sum(f.bytes for p in m.packages for f in p.files if f.path != "manifest.json")
    )
    patch.setattr(baking_manifest.BakingManifest, "total_bytes", total)


def readiness_ignored(patch):
    real = phase6_preparer.Phase6Preparer.assess

    def always(self, package):
        found = real(self, package)
        ready = tuple(
            readiness.judge(c.name, 0.0, 0.0, c.direction, c.unit) for c in found.criteria
        )
        return readiness.Readiness(
            criteria=ready, quality_score=found.quality_score, completeness=1.0
        )

    patch.setattr(phase6_preparer.Phase6Preparer, "assess", always)


def copied_in_place(patch):
    """The copy goes straight to its name, so an interrupted one stays."""
    from contextlib import contextmanager

    @contextmanager
    def unstaged(path, *, replace=False):
        path.mkdir(parents=True)
        yield path
        import os

        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    patch.setattr(phase6_preparer, "staged_directory", unstaged)


def overwrites(patch):
    real = phase6_preparer.Phase6Preparer.hand_off

    def hand_off(self, package, inbox):
        name = json.loads((package / "package.json").read_text())["name"]
        shutil.rmtree(inbox / name, ignore_errors=True)
        return real(self, package, inbox)

    patch.setattr(phase6_preparer.Phase6Preparer, "hand_off", hand_off)


def dated(patch):
    import time

    real = phase6_preparer._write

    def write(path, value):
        if path.name == "lineage.json":
            value = {**value, "exported_at": str(time.time_ns())}
        real(path, value)

    patch.setattr(phase6_preparer, "_write", write)


def says(file, **changes):
    """The preparer writes something else into a file, and nobody looks at it before it is sent."""

    def defect(patch):
        real = phase6_preparer._write

        def write(path, value):
            if path.name == file:
                value = {k: changes[k](v) if k in changes else v for k, v in value.items()}
            real(path, value)

        patch.setattr(phase6_preparer, "_write", write)

    return defect


def zeros(digest):
    return "sha256:" + "0" * 64


def twice_the_ratio(compression):
    return {**compression, "fp32_ratio": 2 * compression["fp32_ratio"]}


@pytest.mark.parametrize(
    ("defect", "named"),
    [
        (says("lineage.json", source_digest=zeros), "source_digest: sha256:0000"),
        (says("lineage.json", data_digest=zeros), "data_digest: sha256:0000"),
        (says("package.json", quality_score=lambda score: 0.9999), "quality_score: 0.9999"),
        (says("package.json", compression=twice_the_ratio), "fp32_ratio: "),
        (says("labels.json", classes=lambda names: [*names[1:], names[0]]), "classes: ['1', '2'"),
    ],
)
def test_a_package_that_says_what_is_not_so_is_named(run_check, monkeypatch, defect, named):
    defect(monkeypatch)
    run = run_check(
        "transitions.phase5_to_phase6", ReferenceSubject(), arguments=("-k", "to_phase6")
    )
    assert run.outcome is Outcome.FAIL
    assert "untrue_fields is 1" in run.reason
    assert named in run.reason


@pytest.mark.usefixtures("fleet_trained_once")
@pytest.mark.parametrize(
    ("check", "defect", "named"),
    [
        ("phase5_to_phase6", lineage_dropped, "not ready: completeness"),
        ("phase5_to_phase6", total_without_manifests, "total_size"),
        ("rollback", readiness_ignored, "accepted"),
        ("rollback", copied_in_place, "sides_changed"),
        ("rollback", overwrites, "another package of the name"),
        ("repeat_is_idempotent", dated, "same_bytes"),
        ("repeat_is_idempotent", overwrites, "second_handoff"),
    ],
)
def test_a_seeded_defect_is_named(run_check, monkeypatch, check, defect, named):
    defect(monkeypatch)
    # The fleet is eight models to train, and only one defect is in what is said of all of them.
    which = "fleet" if defect is total_without_manifests else f"test_{check}"
    run = run_check(f"transitions.{check}", ReferenceSubject(), arguments=("-k", which))
    assert run.outcome in (Outcome.FAIL, Outcome.ERROR)
    assert named in run.reason


def test_claims_that_are_not_the_files_are_named(run_check, monkeypatch):
    claims_copied(monkeypatch)
    run = run_check(
        "transitions.phase5_to_phase6", ReferenceSubject(), arguments=("-k", "to_phase6")
    )
    assert run.outcome is Outcome.FAIL
    assert "claimed_metrics" in run.reason
