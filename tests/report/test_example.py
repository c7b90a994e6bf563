"""The committed example run is one: sealed, recomputable, and rendered by what is here now.

After a change of the pages: `forge-harness report reports/example`. After one of the policy: move
what `forge-harness run --run-dir first` makes here; it has the path of the checkout in it.
"""

import re
from pathlib import Path

import pytest

from forge_harness.cli.summary import summary
from forge_harness.policy import load_policy
from forge_harness.report import write_reports
from forge_harness.rundir import read_policy, read_record
from forge_harness.scoring import exit_code_for, verify_run

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "reports" / "example"


def test_the_example_verifies():
    assert verify_run(EXAMPLE) == []


def test_the_example_is_of_the_policy_that_ships():
    assert read_policy(EXAMPLE).digest == load_policy().digest


@pytest.mark.parametrize("name", ["report.md", "junit.xml"])
def test_the_example_is_what_the_writers_write_today(tmp_path, name):
    record, policy = read_record(EXAMPLE), read_policy(EXAMPLE)
    write_reports(tmp_path, record, policy, ("html", "md", "junit"))
    assert (tmp_path / name).read_bytes() == (EXAMPLE / name).read_bytes()


def evidence(check):
    found = next(row for row in read_record(EXAMPLE).checks if row.id == check)
    return {entry.name: entry for entry in found.evidence}


def percent(*values):
    return [f"{100 * value:.2f}" for value in values]


@pytest.mark.parametrize("task", ["digits", "bytes"])
def test_the_quality_the_readme_states_is_the_example_s(task):
    """It stayed behind when the example was replaced."""
    measured = evidence("gates.quantized_accuracy_ratio")
    arms = [
        measured[f"accuracy.{task}.{arm}"].value for arm in ("full", "ternary", "post_training")
    ]
    ratio, low, high = percent(
        *(measured[f"{name}.{task}"].value for name in ("ratio", "ratio_low", "ratio_high"))
    )
    row = " | ".join(f"{share} %" for share in percent(*arms))
    assert f"| {row} | {ratio} % [{low}, {high}] |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("arm", ["int8", "default"])
def test_the_step_s_cost_the_readme_states_is_the_example_s(arm):
    cost = evidence("performance.training_overhead")[f"ratio_{arm}"]
    low, high = (float(end) for end in re.findall(r"\d\.\d+", cost.reason)[-2:])
    stated = f"{cost.value:.2f} [{low:.2f}, {high:.2f}]"
    assert stated in (ROOT / "README.md").read_text()


def test_what_the_readme_shows_of_a_run_is_the_example_s():
    record, policy = read_record(EXAMPLE), read_policy(EXAMPLE)
    first = Path("first")
    said = summary(record, policy, first, [first / "report.html"], exit_code_for(record)).strip()
    assert f"```text\n{said}\n```" in (ROOT / "README.md").read_text()
