"""The committed example run is one: sealed, recomputable, and rendered by what is here now."""

from pathlib import Path

import pytest

from forge_harness.report import write_reports
from forge_harness.rundir import read_policy, read_record
from forge_harness.scoring import verify_run

EXAMPLE = Path(__file__).parents[2] / "reports" / "example"


def test_the_example_verifies():
    assert verify_run(EXAMPLE) == []


@pytest.mark.parametrize("name", ["report.md", "junit.xml"])
def test_the_example_is_what_the_writers_write_today(tmp_path, name):
    record, policy = read_record(EXAMPLE), read_policy(EXAMPLE)
    write_reports(tmp_path, record, policy, ("html", "md", "junit"))
    assert (tmp_path / name).read_bytes() == (EXAMPLE / name).read_bytes()
