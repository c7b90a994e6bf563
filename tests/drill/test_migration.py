"""Old stores under faults: the store migrates, a migration in pieces does not."""

import shutil

import pytest

from forge_harness.drill.storage import run_campaign
from forge_harness.drill.tally import Status

from .old_store import write_schema_2

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def run(tmp_path, opener, trials):
    write_schema_2(tmp_path)
    return run_campaign(
        "migration", opener, profile="quick", trials=trials, old_stores=tmp_path, stop_early=True
    )


def test_killed_while_it_migrates_it_migrates_on_the_next_open(tmp_path):
    report = run(tmp_path, "forge_harness.state:Store.open", 4)
    assert report.status is Status.HELD, report.findings
    assert report.trials == 4
    assert report.points > 20


def test_a_migration_in_pieces_is_found(tmp_path):
    report = run(tmp_path, "forge_harness.drill.store_mutants:piecemeal_migration", 12)
    assert report.status is Status.LOST
