"""Each state check goes red for its own seeded bug of the store, and is green for the store."""

import shutil
from dataclasses import replace

import pytest

from forge_harness.drill import power_cut, storage, strace, syscalls
from forge_harness.drill.defects import all_defects, defects_of
from forge_harness.drill.tally import NotMeasured
from forge_harness.subject.reference import ReferenceSubject

SOUND = [
    "bit_flips",
    "truncation_and_swap",
    "newer_schema_refused",
    "concurrent_writers",
    "collection_keeps_live",
    "checkpoint_restore",
]

MEASURED_HERE = {*SOUND, "commit_atomic", "io_errors", "migration_golden"}
"""All but `power_loss`, which needs a loop device."""


@pytest.fixture
def few_trials(monkeypatch):
    """A handful of struck calls, those that sync a new content among them: traced runs are slow.

    Enough for every seeded defect; `forge-harness drill` runs each at the size of the check.
    """
    enumerate_points = syscalls.enumerate_points

    def few(scene, *arguments):
        points = enumerate_points(scene, *arguments)
        return [p for p in points if p.name == "rename" or "/tmp/" in p.target()][:3] + points[-3:]

    monkeypatch.setattr(syscalls, "enumerate_points", few)
    for name, trials in {"kill": 6, "replay": 60, "errors": 0, "collection": 2000}.items():
        changed = replace(storage.CAMPAIGNS[name], quick=trials)
        monkeypatch.setitem(storage.CAMPAIGNS, name, changed)


@pytest.mark.parametrize("name", SOUND)
def test_the_store_is_sound(run_check, name):
    run = run_check(f"state.{name}")
    assert run.outcome == "pass", run.reason


@pytest.mark.parametrize("defect", defects_of("state"), ids=lambda d: d.id)
def test_a_seeded_defect_is_found(run_check, few_trials, defect):
    run = run_check(defect.check, defect.subject())
    assert run.outcome == "fail", run.reason
    assert defect.shows in run.reason, run.reason


def test_damage_of_another_kind_is_found_too(run_check):
    """A store that never verifies: one defect, which two checks must see."""
    subject = all_defects()["store_never_verifies"].subject()
    run = run_check("state.truncation_and_swap", subject)
    assert run.outcome == "fail", run.reason
    assert "swaps_silent is" in run.reason


def test_every_check_that_runs_here_has_a_defect():
    assert {d.check.removeprefix("state.") for d in defects_of("state")} == MEASURED_HERE


@pytest.mark.parametrize("check", ["commit_atomic", "io_errors"])
def test_the_store_survives_struck_calls(run_check, few_trials, check):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    run = run_check(f"state.{check}")
    assert run.outcome == "pass", run.reason


@pytest.mark.parametrize("check", ["commit_atomic", "io_errors", "migration_golden"])
def test_without_strace_they_are_not_measured(run_check, monkeypatch, check):
    monkeypatch.setattr(strace, "_problem", lambda: "strace is not installed")
    run = run_check(f"state.{check}")
    assert run.outcome == "not_measured"
    assert "strace is not installed" in run.reason or "no old store" in run.reason


def test_without_root_a_power_cut_is_not_measured(run_check, monkeypatch):
    def refuse():
        raise NotMeasured("cutting the power of a loop device needs root on Linux")

    monkeypatch.setattr(power_cut, "_require", refuse)
    run = run_check("state.power_loss", profile="full")
    assert run.outcome == "not_measured"
    assert "needs root" in run.reason


class KeepsDirectories(ReferenceSubject):
    """Its checkpoints are directories, which it makes anew."""

    def save_session(self, session, path):
        (path / "inner").mkdir(parents=True)
        super().save_session(session, path / "inner" / "state")

    def resume_session(self, task, options, path):
        return super().resume_session(task, options, path / "inner" / "state")


def test_a_checkpoint_may_be_a_directory(run_check):
    run = run_check("state.checkpoint_restore", KeepsDirectories())
    assert run.outcome == "pass", run.reason
