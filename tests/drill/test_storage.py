"""Campaigns, small: what they promise to see, and what they say when they cannot run."""

import json
import re
import shutil

import pytest

from forge_harness.drill import (
    children,
    damage,
    limits,
    migration,
    power_cut,
    storage,
    strace,
    workload,
)
from forge_harness.drill.kills import UNREACHED
from forge_harness.drill.storage import MUTANTS, run_campaign, run_mutant, run_storage
from forge_harness.drill.tally import Status, Tally
from forge_harness.drill.target import OWN_STORE, open_store
from forge_harness.errors import UsageError

BUGS = {mutant.name: mutant for mutant in MUTANTS}


@pytest.fixture
def old_stores(tmp_path):
    directory = tmp_path / "old"
    with open_store(OWN_STORE, directory / "one") as store:
        store.commit(workload.states(0, 0, "small"))
        view = workload.seen(store)
    (directory / "one.json").write_text(json.dumps(view))
    return directory


@pytest.mark.parametrize(
    ("name", "trials"),
    [("bit_flips", 60), ("swaps", 20), ("file_limit", 2), ("collection", 40), ("newer_schema", 0)],
)
def test_the_store_holds(name, trials):
    report = run_campaign(name, profile="quick", trials=trials)
    assert report.status is Status.HELD, report.findings
    assert report.trials >= min(trials, 2)


@pytest.mark.parametrize(
    "name",
    [
        *("no_check", "no_grace", "forgets_kept", "any_schema"),
        *("no_head", "collects_damaged", "deletes_damaged", "short_writes"),
        *("no_read_lock", "ignores_parent"),
    ],
)
def test_seeded_bugs_that_need_no_strace_are_caught(name):
    report = run_mutant(BUGS[name])
    assert report.status == "caught", report.reason


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no_adopt_sync", "adopt, cut before call .* nothing survives: .*is damaged"),
        ("trusts_orphans", "replace, cut before call .*is damaged"),
        ("no_backup", "no copy of the index as it was"),
    ],
)
def test_seeded_bugs_of_what_is_taken_over_are_caught(name, why):
    report = run_mutant(BUGS[name], old_stores=storage.shipped_old_stores())
    assert report.status == "caught", report.reason
    assert re.search(why, report.reason), report.reason


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_one_trial_strikes_one_system_call():
    """No half of it is syncs that fail: they were all of them, and the rest an internal error."""
    report = run_campaign("errors", profile="quick", trials=1)
    assert (report.status, report.trials) == (Status.HELD, 1)


def test_the_same_seed_draws_the_same_trials():
    said = [[], []]
    for heard in said:
        run_campaign(
            "bit_flips",
            seed=5,
            profile="quick",
            trials=12,
            tell=lambda done, total, label, heard=heard: heard.append((done, total, label)),
        )
    assert said[0] == said[1]
    assert [done for done, _, _ in said[0]] == list(range(1, 13))


def test_without_strace_nothing_is_green(monkeypatch, old_stores):
    monkeypatch.setattr(strace, "_problem", lambda: "strace is not installed")
    report = run_storage(campaigns=["kill", "errors", "replay", "migration"], old_stores=old_stores)
    assert report.status is Status.NOT_MEASURED
    assert {c.reason for c in report.campaigns} == {"strace is not installed"}


def test_a_survivor_is_no_pass():
    reports = [run_campaign("newer_schema")]
    survivor = storage.MutantReport(
        name="x", bug="y", campaign="kill", status="survived", reason="", trials=3
    )
    report = storage.StorageReport(
        opener=OWN_STORE,
        seed=0,
        profile="quick",
        started_at="",
        seconds=0.0,
        campaigns=tuple(reports),
        mutants=(survivor,),
    )
    assert report.status is Status.NOT_MEASURED
    document = json.loads(json.dumps(report.to_json()))
    assert (document["mutants_caught"], document["mutants_total"]) == (0, 1)


def stopping(after):
    """Progress that interrupts the bit flips, as a signal would, once so many were done."""

    def tell(name, done, total, label):
        if name == "bit_flips" and done >= after:
            raise KeyboardInterrupt

    return tell


def test_an_interrupted_drill_hands_over_what_it_found():
    names, found = ["newer_schema", "bit_flips", "swaps"], []
    bugs = storage.MUTANTS[:2]
    with pytest.raises(KeyboardInterrupt):
        run_storage(campaigns=names, mutants=bugs, tell=stopping(3), stopped=found.append)
    (report,) = found
    assert [(row.name, row.status) for row in report.campaigns] == [
        ("newer_schema", Status.HELD),
        ("bit_flips", Status.NOT_MEASURED),
        ("swaps", Status.NOT_MEASURED),
    ]
    assert [row.status for row in report.mutants] == ["not measured"] * 2
    assert (report.status, report.unreached) == (Status.NOT_MEASURED, 4)
    assert report.to_json()["is_complete"] is False


def test_what_an_interrupted_campaign_saw_lost_is_lost():
    found = []
    with pytest.raises(KeyboardInterrupt):
        run_storage(
            "forge_harness.drill.store_mutants:no_check",
            campaigns=["bit_flips", "newer_schema"],
            profile="quick",
            tell=stopping(60),
            stopped=found.append,
        )
    (report,) = found
    flips, newer = report.campaigns
    assert (flips.status, flips.trials) == (Status.LOST, 60)
    assert (newer.reason, report.status) == (UNREACHED, Status.LOST)


def test_an_old_store_that_lost_something_is_found(old_stores):
    expected = json.loads((old_stores / "one.json").read_text())
    old = migration.old_stores(old_stores)[0]
    assert old.view == expected
    expected["phase5/gone/data"] = "0" * 64
    (old_stores / "one.json").write_text(json.dumps(expected))
    (worse,) = migration.old_stores(old_stores)
    found = migration._look(OWN_STORE, old_stores / "one", worse)
    assert found.result == "lost"
    assert "phase5/gone/data" in found.message


@pytest.mark.parametrize(
    ("harm", "result"),
    [(lambda data: data[:-1] + b"?", "detected"), (lambda data: data, "harmless")],
)
def test_damage_is_told_from_none(tmp_path, harm, result):
    (patient, _) = damage._patients(tmp_path, OWN_STORE, 0)
    content = next(p for p in (patient.template / "objects").rglob("*") if p.is_file())
    content.write_bytes(harm(content.read_bytes()))
    assert damage._look(OWN_STORE, patient.template, patient).result == result


@pytest.mark.parametrize(("trials", "sizes"), [(1, 1), (7, 7), (960, 960), (2000, 960), (0, 48)])
def test_a_sweep_of_disks_has_as_many_sizes_as_it_was_given(trials, sizes, monkeypatch):
    """7 gave 8, and more than 960 a step of nothing."""
    swept = []
    monkeypatch.setattr(
        limits, "fill_disks", lambda tally, opener, *, kibibytes, tell: swept.extend(kibibytes)
    )
    run_campaign("disk_full", trials=trials)
    assert len(set(swept)) == sizes
    assert (min(swept), max(swept)) == (40, 40 + 960 * (sizes - 1) // sizes)


@pytest.mark.parametrize(("trials", "cuts"), [(1, [1]), (5, [3, 2]), (None, [25, 25])])
def test_power_is_cut_as_often_as_was_asked_over_all_workloads(trials, cuts, monkeypatch):
    made = []
    monkeypatch.setattr(
        power_cut, "cut_power", lambda tally, opener, *, trials, shape, tell: made.append(trials)
    )
    run_campaign("power_cut", trials=trials)
    assert made == cuts


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("trials", [2, 4])
def test_old_stores_that_are_not_struck_are_trials_too(trials):
    stores = storage.shipped_old_stores()
    report = run_campaign("migration", profile="quick", trials=trials, old_stores=stores)
    assert (report.status, report.trials) == (Status.HELD, trials), report.reason


def test_a_newer_store_is_opened_as_often_as_was_asked():
    assert run_campaign("newer_schema", trials=2).trials == 2


OPENER = """
import sys, time
from forge_harness.state import Store
CHILD = "storage_writer" in " ".join(sys.orig_argv)

def here_only(root, **options):
    if CHILD:
        raise RuntimeError("only in the process of the drill")
    return Store.open(root, **options)

class Waiting(Store):
    def commit(self, states, **options):
        if str(states[0].name).startswith(("first-", "second-")):
            time.sleep(60)
        return super().commit(states, **options)

def waiting(root, **options):
    return Waiting.open(root, **options)

class Patient(Store):
    def commit(self, states, **options):
        while True:
            try:
                return super().commit(states, **options)
            except Exception:
                time.sleep(0.01)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_store_of_test.py").write_text(OPENER)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_store_of_test"


@pytest.mark.parametrize("name", ["file_limit", "writers", "replay"])
def test_what_no_child_can_open_measures_nothing(own, name):
    """Writers that never began had lost nothing: two campaigns held, others said it had."""
    report = run_campaign(name, f"{own}:here_only", profile="quick", trials=2)
    assert (report.status, report.trials) == (Status.NOT_MEASURED, 0)
    assert "in a fresh process: RuntimeError: only in" in report.reason


def test_writers_that_wait_for_each_other_measure_nothing(own):
    """Nothing they were acknowledged was gone."""
    report = run_campaign("writers", f"{own}:waiting", profile="quick", trials=1)
    assert (report.status, report.acknowledged) == (Status.NOT_MEASURED, 0)
    assert "no commit returned before its writer was killed" in report.reason


def test_a_store_that_tries_again_for_ever_is_a_finding(own, monkeypatch):
    """It ended the drill, and what other campaigns had found was gone."""
    monkeypatch.setitem(children.run.__kwdefaults__, "timeout_s", 5.0)
    tally = Tally("file_limit", 0)
    opener = f"{own}:Patient.open"
    limits.limit_files(tally, opener, limits=[60_000], tell=lambda done, total, label: None)
    report = tally.report()
    assert (report.status, report.unrecoverable) == (Status.LOST, 1)
    assert "did not end within 5 s" in report.reason


@pytest.mark.parametrize(
    ("opener", "said"),
    [
        ("os:getpid", r"cannot be called with a path: .*takes no arguments"),
        ("os:listdir", r"cannot be called with a path, fs: "),
        ("os:fspath", r"returned a str; expected an open store"),
    ],
)
def test_what_opens_no_store_is_refused(opener, said, tmp_path):
    options = {"fs": None} if opener == "os:listdir" else {}
    with pytest.raises(UsageError, match=said):
        open_store(opener, tmp_path, **options)


def test_an_error_inside_a_store_is_not_blamed_on_how_it_was_called(tmp_path):
    with pytest.raises(TypeError, match="not PosixPath"):
        open_store("json:loads", tmp_path)


def test_unknown_names_get_the_nearest():
    with pytest.raises(UsageError, match="bit_flips"):
        run_campaign("bit_flip")
    with pytest.raises(UsageError, match="cannot be imported"):
        run_storage("no.such.module:open", campaigns=["newer_schema"])
