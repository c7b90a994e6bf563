"""init: files that work as written, and never over existing ones."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from forge_harness.cli import needs
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


def test_the_workflow_installs_what_checks_call(project):
    """Every pull request ended with 7 for want of transformers, pip-audit and a declaration."""
    text = (project / ".github" / "workflows" / "forge.yml").read_text()
    job = yaml.safe_load(text)["jobs"]["validate"]
    assert job["env"]["FORGE_HARNESS_DECLARED_ACCELERATOR"] == "none"
    installed = " ".join(step.get("run", "") for step in job["steps"])
    assert "'bitnet-forge-harness[checks]'" in installed
    assert "strace" in installed


def test_the_extra_brings_every_package_that_checks_call():
    project = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    brought = {Requirement(text).name for name in ("checks", "hf") for text in extras[name]}
    assert {need.name for need in needs.NEEDS if need.remedy == needs.EXTRA} <= brought
    assert {"bitnet-forge-harness", "pip-audit"} <= brought


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


@pytest.mark.parametrize("name", ["forge_checks", ".github", ".github/workflows"])
def test_a_file_where_a_directory_goes_stops_everything(tmp_path, invoke, name):
    taken = tmp_path / name
    taken.parent.mkdir(parents=True, exist_ok=True)
    taken.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    result = invoke("init", tmp_path)
    assert result.exit_code == ExitCode.USAGE
    assert f"{taken} is a file; expected a directory, or nothing; nothing was" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dangling_link_in_the_place_of_a_file_stops_everything(tmp_path, invoke):
    (tmp_path / "forge_checks").mkdir()
    (tmp_path / "forge_checks" / "test_example.py").symlink_to(tmp_path / "gone")
    assert invoke("init", tmp_path).exit_code == ExitCode.USAGE
    assert not (tmp_path / "forge.toml").exists()


def test_a_table_in_pyproject_stops_everything(tmp_path, invoke):
    (tmp_path / "pyproject.toml").write_text("[tool.forge-harness.run]\nseed = 1\n")
    result = invoke("init", tmp_path)
    assert result.exit_code == ExitCode.USAGE
    assert "pyproject.toml has [tool.forge-harness]" in result.stderr
    assert "nothing was written" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pyproject.toml"]


def test_what_could_be_written_is_taken_back_when_the_rest_cannot(tmp_path, invoke, monkeypatch):
    from pathlib import Path

    real = Path.open

    def failing(path, mode="r", *rest, **options):
        if path.name == "forge.yml":
            raise OSError(28, "No space left on device")
        return real(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", failing)
    result = invoke("init", tmp_path / "new")
    assert result.exit_code == ExitCode.USAGE
    assert "No space left on device" in result.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_two_configurations_in_one_project_are_seen(project, invoke, monkeypatch):
    (project / "pyproject.toml").write_text("[tool.forge-harness.run]\nseed = 1\n")
    monkeypatch.chdir(project)
    assert invoke("config", "check").exit_code == ExitCode.USAGE
    assert tomllib.loads((project / "forge.toml").read_text())["run"]
