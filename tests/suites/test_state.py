"""Each state check goes red for its own seeded bug of the store, and is green for the store."""

import re
import shutil
from dataclasses import replace

import pytest

from forge_harness.drill import power_cut, storage, strace, syscalls
from forge_harness.drill.tally import NotMeasured
from forge_harness.protocols import StoreSpec
from forge_harness.subject.reference import ReferenceSubject

SOUND = [
    "bit_flips",
    "truncation_and_swap",
    "newer_schema_refused",
    "concurrent_writers",
    "collection_keeps_live",
    "checkpoint_restore",
]


@pytest.fixture
def few_trials(monkeypatch):
    """A handful of struck calls, those that sync a new content among them: traced runs are slow."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    enumerate_points = syscalls.enumerate_points

    def few(scene, *arguments):
        points = enumerate_points(scene, *arguments)
        return [p for p in points if p.name == "rename" or "/tmp/" in p.target()][:3] + points[-3:]

    monkeypatch.setattr(syscalls, "enumerate_points", few)
    for name, trials in {"kill": 6, "replay": 60, "errors": 0}.items():
        changed = replace(storage.CAMPAIGNS[name], quick=trials)
        monkeypatch.setitem(storage.CAMPAIGNS, name, changed)


class KeepsIn(ReferenceSubject):
    """The reference subject with another store."""

    def __init__(self, mutant):
        self._mutant = mutant

    def state_store(self):
        return StoreSpec(
            opener=f"forge_harness.drill.store_mutants:{self._mutant}",
            old_stores=super().state_store().old_stores,
        )


@pytest.mark.parametrize("name", SOUND)
def test_the_store_is_sound(run_check, name):
    run = run_check(f"state.{name}")
    assert run.outcome == "pass", run.reason


@pytest.mark.parametrize(
    ("check", "mutant", "why"),
    [
        ("commit_atomic", "early_answer", r"kill_lost is \d+ trials, expected 0"),
        ("commit_atomic", "no_name_sync", r"replay_(lost|torn|unrecoverable) is \d+"),
        ("bit_flips", "no_check", r"bit_flips_silent is \d+ trials, expected 0"),
        ("truncation_and_swap", "no_check", r"swaps_silent is \d+ trials, expected 0"),
        ("newer_schema_refused", "any_schema", r"newer_schema_torn is 3 trials, expected 0"),
        ("concurrent_writers", "no_lock", r"writers_lost is \d+ trials.*another writer"),
        ("collection_keeps_live", "no_grace", r"collection_lost is \d+ trials"),
        ("collection_keeps_live", "forgets_kept", r"collection_lost is \d+ trials"),
        ("io_errors", "retried_sync", r"errors_(torn|unrecoverable) is \d+ trials"),
    ],
)
def test_a_seeded_bug_is_found(run_check, few_trials, check, mutant, why):
    run = run_check(f"state.{check}", KeepsIn(mutant))
    assert run.outcome == "fail", run.reason
    assert re.search(why, run.reason), run.reason


@pytest.mark.parametrize("check", ["commit_atomic", "io_errors"])
def test_the_store_survives_struck_calls(run_check, few_trials, check):
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


class ForgetsTheStep(ReferenceSubject):
    """Resumes from another checkpoint than the one it is given."""

    def save_session(self, session, path):
        session.step_index += 1
        super().save_session(session, path)
        session.step_index -= 1


def test_a_checkpoint_of_another_step_is_found(run_check):
    run = run_check("state.checkpoint_restore", ForgetsTheStep())
    assert run.outcome == "fail"
    assert "resumed_at is 5 steps, expected 4" in run.reason
