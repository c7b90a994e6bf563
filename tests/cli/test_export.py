"""`forge-harness export`: from training directories and checkpoints to packages."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from forge_harness.canonical import tree_digest
from forge_harness.cli import app
from forge_harness.formats import FORMATS
from forge_harness.paths import fixtures_dir

MODELS = fixtures_dir() / "models"


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_one_source_is_one_package(tmp_path):
    result = run(MODELS / "v1.0", "--out", tmp_path / "p", "--format", "gguf-tq2_0", "--json")
    assert result.exit_code == 0
    (row,) = json.loads(result.stdout)
    assert (row["name"], row["readiness"]["status"]) == ("p", "READY")
    assert (tmp_path / "p" / "gguf-tq2_0" / "model.gguf").is_file()
    assert row["bytes"] == sum(p.stat().st_size for p in (tmp_path / "p").rglob("*") if p.is_file())


def test_a_format_named_twice_is_written_once(tmp_path):
    twice = ("--format", "hf-packed") * 2
    result = run(MODELS / "v1.0", "--out", tmp_path / "p", *twice)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (tmp_path / "p" / "hf-packed" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["../../evil", "a\\b", "..", "", "\udcff", "a\x1b[2J", "a\nb"])
def test_a_name_that_is_none_is_refused(tmp_path, name):
    result = run(MODELS / "v1.0", "--out", tmp_path / "p", "--name", name)
    assert result.exit_code == 4
    assert "is no plain name" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "p").exists()


def test_several_sources_get_a_baking_manifest(tmp_path):
    result = run(MODELS / "v1.0", MODELS / "custom", "--out", tmp_path / "p")
    assert result.exit_code == 0
    manifest = json.loads((tmp_path / "p" / "baking-manifest.json").read_text())
    assert [package["name"] for package in manifest["packages"]] == ["custom", "v1.0"]
    assert "2 packages" in result.stdout


@pytest.mark.parametrize("second", ["v1.0", "v1.0/", "../v1.0", "v1.0/x/.."])
def test_sources_of_one_name_are_refused_before_anything_is_written(tmp_path, monkeypatch, second):
    (tmp_path / "v1.0" / "x").mkdir(parents=True)
    (tmp_path / "deeper" / "v1.0" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deeper")
    result = run(MODELS / "v1.0", second, "--out", tmp_path / "p")
    assert result.exit_code == 4
    assert "would both be the package 'v1.0'" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "p").exists()


def test_a_package_that_is_there_is_found_before_anything_is_written(tmp_path):
    (tmp_path / "p" / "custom").mkdir(parents=True)
    (tmp_path / "p" / "custom" / "x").write_text("")
    result = run(MODELS / "v1.0", MODELS / "custom", "--out", tmp_path / "p")
    assert result.exit_code == 4
    assert "exists and is not an empty directory" in result.stderr
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["custom"]


def test_a_training_directory_is_a_source(tmp_path):
    train = ["train", "--task", "digits", "--steps", "200", "--out", str(tmp_path / "run")]
    assert CliRunner().invoke(app, train).exit_code == 0
    result = run(tmp_path / "run", "--out", tmp_path / "p")
    assert result.exit_code == 0, result.output
    lineage = json.loads((tmp_path / "p" / "lineage.json").read_text())
    assert (lineage["task"], lineage["step"]) == ("digits", 200)


def test_what_is_not_ready_is_refused_with_exit_code_1(tmp_path):
    source = fixtures_dir() / "checkpoints" / "hf-online"
    result = run(source, "--out", tmp_path / "p")
    assert result.exit_code == 1
    assert "accuracy is not measured" in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert run(source, "--out", tmp_path / "p", "--allow-not-ready").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 4, "Name one or more sources, or --fleet"),
        (("a", "--fleet"), 4, "Name one or more sources, or --fleet"),
        (("a", "b", "--name", "x"), 4, "--name names one package"),
        (("nowhere",), 4, "'nowhere' does not exist"),
        (("--fleet", "--format", "gguf-tq2_0"), 4, "--format changes nothing with --fleet; leave"),
        (("--fleet", "--allow-not-ready"), 4, "--allow-not-ready changes nothing with --fleet"),
        (("--fleet", "--exclude", "x"), 4, "--exclude changes nothing with --fleet"),
    ],
)
def test_bad_input_is_one_sentence(arguments, code, sentence, tmp_path):
    result = run(*arguments, "--out", tmp_path / "p")
    assert result.exit_code == code
    assert sentence in result.stderr
    assert not (tmp_path / "p").exists()


def test_formats_are_those_that_are_written():
    from forge_harness.cli import export

    assert set(export.FORMATS) == set(FORMATS) - {"native"}


def test_the_matrix_is_printed():
    result = CliRunner().invoke(app, ["inspect", "--matrix", "--json"])
    rows = json.loads(result.stdout)
    assert [row["model_type"] for row in rows][:2] == ["BitNet v1.0", "BitNet v0.9"]
    text = CliRunner().invoke(app, ["inspect", "--matrix"])
    assert "Auto-detect" in text.stdout
    assert CliRunner().invoke(app, ["inspect"]).exit_code == 4
    idle = CliRunner().invoke(app, ["inspect", "--matrix", "--i2s-layout", "arm"])
    assert (idle.exit_code, idle.stdout) == (4, "")
    assert "--i2s-layout changes nothing with --matrix; leave it out" in idle.stderr


@pytest.mark.parametrize("inside", [".", "x", "deeper/x"])
def test_a_package_inside_its_source_is_refused_and_the_source_unchanged(tmp_path, inside):
    source = shutil.copytree(MODELS / "v1.0", tmp_path / "source")
    before = tree_digest(source)
    result = run(source, "--out", source / inside)
    assert result.exit_code == 4, result.output
    assert "name a place outside" in result.stderr or "is source and destination" in result.stderr
    assert tree_digest(source) == before


def test_no_package_lies_inside_the_source_of_another(tmp_path):
    source = shutil.copytree(MODELS / "v1.0", tmp_path / "source")
    before = tree_digest(source)
    result = run(MODELS / "custom", source, "--out", source)
    assert (result.exit_code, tree_digest(source)) == (4, before), result.output
