"""init: files that work as written, and never over existing ones."""

import tomllib

import pytest

from forge_harness.config import load_config
from forge_harness.errors import ExitCode


@pytest.fixture
def project(tmp_path, invoke):
    assert invoke("init", tmp_path / "new").exit_code == 0
    return tmp_path / "new"


def test_the_configuration_is_valid_and_points_at_the_example(project):
    loaded = load_config(environ={}, cwd=project)
    assert set(loaded.given) == {"run.suite_paths"}
    assert loaded.suite_paths() == (project / "forge_checks",)
    assert (project / "forge_checks" / "test_example.py").is_file()


def test_the_example_check_passes_and_is_listed(project, pytester):
    result = pytester.runpytest_subprocess(str(project / "forge_checks"), "-q")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["Integration score 100 (at most 100), 100 % measured"])


def test_the_workflow_always_gates(project):
    text = (project / ".github" / "workflows" / "forge.yml").read_text()
    gate = text.partition("\n  gate:\n")[2]
    assert "if: always()" in gate
    assert "forge-harness gate forge-run" in gate
    assert "|| true" not in gate


@pytest.mark.parametrize(
    "name", ["forge.toml", "forge_checks/test_example.py", ".github/workflows/forge.yml"]
)
def test_an_existing_file_stops_everything(tmp_path, invoke, name):
    taken = tmp_path / name
    taken.parent.mkdir(parents=True, exist_ok=True)
    taken.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    result = invoke("init", tmp_path)
    assert result.exit_code == ExitCode.USAGE
    assert f"Refusing to overwrite {taken}; nothing was written." in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert taken.read_text() == "mine"


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path, invoke):
    (tmp_path / "file").write_text("")
    result = invoke("init", tmp_path / "file")
    assert result.exit_code == ExitCode.USAGE
    assert "Cannot write" in result.stderr


def test_two_configurations_in_one_project_are_seen(project, invoke, monkeypatch):
    (project / "pyproject.toml").write_text("[tool.forge-harness.run]\nseed = 1\n")
    monkeypatch.chdir(project)
    assert invoke("config", "check").exit_code == ExitCode.USAGE
    assert tomllib.loads((project / "forge.toml").read_text())["run"]
