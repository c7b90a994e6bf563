"""list: the whole catalogue, with and without a test."""

import json
from collections import Counter
from copy import deepcopy

import pytest

from forge_harness.cli import collect
from forge_harness.errors import ExitCode
from forge_harness.policy import load_policy

MINE = """
import pytest

@pytest.mark.forge_check("mine.holds", title="It holds", severity="high")
def test_holds(evidence):
    evidence.record("x", 1)

@pytest.mark.forge_check("environment.python_version")
def test_of_a_shipped_check(evidence):
    evidence.record("x", 1)

@pytest.mark.forge_check("also.two", title="Both hold", severity="high")
@pytest.mark.parametrize("n", [1, 2])
def test_two(evidence, n):
    evidence.record("x", n)
"""

# A check of one's own that nobody has written yet.
CATALOGUE = """
[[check]]
id = "mine.unwritten"
title = "Nothing is measured"
suite = "mine"
severity = "low"
component = "PipelineValidator"
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test_mine.py").write_text(MINE)
    (tmp_path / "mine" / "catalogue.toml").write_text(CATALOGUE)
    (tmp_path / "forge.toml").write_text('[run]\nsuite_paths = ["mine"]\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def marks():
    """Marks of a project's checks, once they were collected: its files are always the same."""
    return []


@pytest.fixture
def collected_before(monkeypatch, marks):
    """For tests of what is made of the marks: collecting imports all suites, in a new process."""
    collected_marks = collect.collected_marks

    def remembered(suite_paths):
        if not marks:
            marks.extend(collected_marks(suite_paths))
        return deepcopy(marks)

    monkeypatch.setattr(collect, "collected_marks", remembered)


def test_checks_are_the_catalogue_and_the_users_own(invoke, project):
    rows = json.loads(invoke("list", "checks", "--json").output)
    by_id = {row["id"]: row for row in rows}
    catalogue = load_policy().by_id
    assert set(by_id) == {*catalogue, "mine.holds", "also.two", "mine.unwritten"}
    for name, entry in catalogue.items():
        for field in ("title", "suite", "severity", "component"):
            assert by_id[name][field] == getattr(entry, field)
        assert by_id[name]["profiles"] == [str(profile) for profile in entry.profiles]
    assert (by_id["mine.holds"]["collected"], by_id["mine.holds"]["tests"]) == (True, 1)
    assert by_id["also.two"]["tests"] == 2
    assert by_id["environment.python_version"]["tests"] == 1, "another test is none of it"
    unbuilt = by_id["mine.unwritten"]
    assert (unbuilt["collected"], unbuilt["tests"]) == (False, 0)


@pytest.mark.usefixtures("collected_before")
def test_a_table_says_none_where_there_is_no_test(invoke, project):
    lines = invoke("list", "checks", "--suite", "security", "--suite", "mine").output.splitlines()
    assert "none" in next(line for line in lines if line.startswith("mine.unwritten"))
    assert next(line for line in lines if line.startswith("mine.holds")).split()[4] == "1"
    assert not any(line.startswith("data.") for line in lines)
    assert lines[-1].startswith("14 checks, ")


def test_a_module_that_cannot_be_collected_is_named(invoke, project):
    (project / "mine" / "test_mine.py").write_text("import no_such_module\n" + MINE)
    result = invoke("list", "checks", "--suite", "mine", "--json")
    assert result.exit_code == 0
    assert [row["collected"] for row in json.loads(result.stdout)] == [False]
    (line,) = result.stderr.splitlines()
    assert line.startswith("Not collected: test_mine.py could not be collected: ModuleNotFound")


@pytest.mark.usefixtures("collected_before")
def test_an_unknown_suite_gets_the_nearest_name(invoke, project):
    result = invoke("list", "checks", "--suite", "securty")
    assert result.exit_code == ExitCode.USAGE
    assert "Unknown suite 'securty'. Did you mean 'security'?" in result.stderr


def test_suites_count_by_severity(invoke):
    rows = json.loads(invoke("list", "suites", "--json").output)
    policy = load_policy()
    assert sum(row["weight"] for row in rows) == 100
    counted = Counter()
    for row in rows:
        assert row["weight"] == policy.suite_weights[row["name"]]
        counted.update(row["checks"])
    assert counted == Counter(entry.severity.value for entry in policy.catalogue)
    assert invoke("list", "suites").output.splitlines()[1].split()[0] == rows[0]["name"]


def test_waivers_say_which_have_expired(invoke, project):
    assert "No waiver file is configured" in invoke("list", "waivers").output
    (project / "waivers.toml").write_text(
        '[[waiver]]\ncheck = "data.balance"\nowner = "ann"\nreason = "known"\nissue = "#7"\n'
        'expires = "2020-01-01"\n'
        '[[waiver]]\ncheck = "data.leak_canary"\nowner = "bob"\nreason = "soon"\nissue = "#8"\n'
        'expires = "2999-01-01"\n'
    )
    (project / "forge.toml").write_text('[run]\nwaivers = "waivers.toml"\n')
    rows = json.loads(invoke("list", "waivers", "--json").output)
    assert not any(row["unknown"] for row in rows)
    assert [(row["check"], row["expired"]) for row in rows] == [
        ("data.balance", True),
        ("data.leak_canary", False),
    ]
    assert "expired" in invoke("list", "waivers").output
    (project / "forge.toml").write_text('[run]\nwaivers = "gone.toml"\n')
    assert invoke("list", "waivers").exit_code == ExitCode.USAGE


@pytest.mark.usefixtures("collected_before")
def test_a_waiver_of_a_check_that_does_not_exist_says_so(invoke, project):
    waiver = (
        '[[waiver]]\ncheck = "{}"\nowner = "ann"\nreason = "known"\nissue = "#7"\n'
        'expires = "2999-01-01"\n'
    )
    ids = ("data.balance", "mine.unwritten", "mine.holds", "data.balanse")
    (project / "waivers.toml").write_text("".join(map(waiver.format, ids)))
    with (project / "forge.toml").open("a") as stream:
        stream.write('waivers = "waivers.toml"\n')
    rows = json.loads(invoke("list", "waivers", "--json").output)
    assert [row["unknown"] for row in rows] == [False, False, False, True]
    *others, last = invoke("list", "waivers").output.splitlines()
    assert "  unknown check  " in last
    assert all("  live  " in line for line in others[1:])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTEST_ADDOPTS", "--bogus"),
        ("PYTEST_PLUGINS", "no_such_plugin"),
        ("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"),
    ],
)
def test_what_is_set_for_other_pytest_runs_changes_no_listing(
    invoke, project, monkeypatch, name, value
):
    monkeypatch.setenv(name, value)
    result = invoke("list", "checks", "--suite", "mine")
    assert result.exit_code == 0, result.stderr
    assert "2 checks, 1 with a test" in result.output


@pytest.mark.usefixtures("collected_before")
def test_a_name_no_check_reads_is_refused_where_all_checks_are_known(invoke, project):
    (project / "p.toml").write_text(
        "[suite_weights]\nmine = 2\n[thresholds.mine]\na.at_least = 1\n"
    )
    (project / "forge.toml").write_text('[run]\nsuite_paths = ["mine"]\npolicy = "p.toml"\n')
    assert invoke("list", "checks", "--suite", "mine").exit_code == 0
    (project / "p.toml").write_text("[suite_weights]\nmien = 2\n")
    result = invoke("list", "checks", "--suite", "mine")
    assert result.exit_code == ExitCode.USAGE
    assert "Unknown suite 'mien'. Did you mean 'mine'?" in result.stderr


def test_a_policy_that_is_refused_is_wrong_usage_in_its_own_sentence(invoke, project):
    """It was an internal error, "Collecting the checks failed: ERROR: ... number..", and 3."""
    (project / "p.toml").write_text("[severity_weights]\nlow = 0\n")
    (project / "forge.toml").write_text('[run]\nsuite_paths = ["mine"]\npolicy = "p.toml"\n')
    result = invoke("list", "checks", "--suite", "mine")
    assert result.exit_code == ExitCode.USAGE
    assert result.stderr == (
        f"Error: {project / 'p.toml'}: severity_weights.low is 0; expected a positive integer.\n"
    )


def test_one_check_is_one(invoke, project, collected_before):
    (project / "mine" / "catalogue.toml").unlink()
    result = invoke("list", "checks", "--suite", "mine")
    assert "\n1 check, 1 with a test. Policy sha256:" in result.output
