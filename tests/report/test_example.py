"""The committed example run is one: sealed, recomputable, and rendered by what is here now.

After a change of the pages: `forge-harness report reports/example`. After one of the policy: move
what `forge-harness run --run-dir first` makes here; it has the path of the checkout in it.
"""

from pathlib import Path

import pytest

from forge_harness.policy import load_policy
from forge_harness.report import write_reports
from forge_harness.rundir import read_policy, read_record
from forge_harness.scoring import verify_run

EXAMPLE = Path(__file__).parents[2] / "reports" / "example"


def test_the_example_verifies():
    assert verify_run(EXAMPLE) == []


def test_the_example_is_of_the_policy_that_ships():
    assert read_policy(EXAMPLE).digest == load_policy().digest


@pytest.mark.parametrize("name", ["report.md", "junit.xml"])
def test_the_example_is_what_the_writers_write_today(tmp_path, name):
    record, policy = read_record(EXAMPLE), read_policy(EXAMPLE)
    write_reports(tmp_path, record, policy, ("html", "md", "junit"))
    assert (tmp_path / name).read_bytes() == (EXAMPLE / name).read_bytes()
