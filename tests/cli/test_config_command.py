"""config show, check, schema; and flags reaching the configuration."""

import json
import tomllib

import pytest

from forge_harness.config import config_json_schema, load_config
from forge_harness.errors import ExitCode


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "forge.toml").write_text('[run]\nseed = 4\nsubject = "mine:thing"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_show_prints_a_file_that_loads_back(invoke, project, tmp_path):
    output = invoke("config", "show").output
    saved = tmp_path / "saved.toml"
    saved.write_text(output, encoding="utf-8")
    assert load_config(file=saved, environ={}).values() == load_config(environ={}).values()
    assert tomllib.loads(output)["run"]["seed"] == 4


def test_show_origin_names_the_source_of_each_value(invoke, project, monkeypatch):
    monkeypatch.setenv("FORGE_HARNESS_RUN_WORKERS", "3")
    output = invoke("config", "show", "--origin").output
    lines = [line.split(maxsplit=3) for line in output.splitlines()]
    assert ["run.seed", "4", "file", "in forge.toml"] in lines
    assert [
        "run.workers",
        "3",
        "environment",
        "in the environment (FORGE_HARNESS_RUN_WORKERS)",
    ] in lines
    assert ["train.steps", "308", "default"] in lines


def test_show_json_has_values_and_digest(invoke, project):
    document = json.loads(invoke("config", "show", "--json", "--origin").output)
    loaded = load_config(environ={})
    assert document["digest"] == loaded.digest
    assert document["values"]["run.seed"] == {"value": 4, "origin": "file"}
    assert set(document["values"]) == set(loaded.values())


def test_another_file_can_be_named(invoke, project, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text("[run]\nseed = 9\n")
    assert "seed = 9" in invoke("config", "show", "-c", other).output
    missing = invoke("config", "show", "--config", tmp_path / "no.toml")
    assert missing.exit_code == ExitCode.USAGE
    assert "Cannot read configuration file" in missing.stderr


def test_check_accepts_a_valid_file(invoke, project):
    result = invoke("config", "check")
    assert result.exit_code == ExitCode.PASS
    assert load_config(environ={}).digest in result.output


def test_check_lists_every_problem(invoke, project):
    (project / "forge.toml").write_text("[run]\nsede = 1\nworkers = -1\n")
    result = invoke("config", "check")
    assert result.exit_code == ExitCode.USAGE
    assert len(result.stderr.splitlines()) == 2
    assert "Did you mean 'run.seed'?" in result.stderr
    assert "run.workers is -1 in forge.toml; expected an integer from 0 to 256." in result.stderr


def test_check_finds_files_that_are_not_there(invoke, project):
    (project / "forge.toml").write_text('[run]\npolicy = "p.toml"\nsuite_paths = ["mine"]\n')
    result = invoke("config", "check")
    assert result.exit_code == ExitCode.USAGE
    assert f"run.policy names {project / 'p.toml'}, which does not exist." in result.stderr
    assert f"run.suite_paths names {project / 'mine'}, which does not exist." in result.stderr


def test_schema_is_the_published_one(invoke):
    assert json.loads(invoke("config", "schema").output) == config_json_schema()


@pytest.mark.parametrize("command", [["config", "show"], ["run"], ["doctor"], ["list", "suites"]])
def test_a_broken_configuration_is_4_everywhere(invoke, project, command):
    (project / "forge.toml").write_text("[run]\nsede = 1\n")
    result = invoke(*command)
    assert result.exit_code == ExitCode.USAGE
    assert "Unknown key 'run.sede' in forge.toml. Did you mean 'run.seed'?" in result.stderr
