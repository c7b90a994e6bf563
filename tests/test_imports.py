"""Modules of the standard library come from there, those of the user before installed ones."""

import os
import subprocess
import sys
import sysconfig

import pytest

from forge_harness.imports import import_from, import_paths, python_program


@pytest.fixture(autouse=True)
def _own_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_program_does_not_import_from_the_working_directory(tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    (here / "secrets.py").write_text("raise SystemExit('not the library')")
    (elsewhere / "asked.py").write_text("import secrets, sys; print(secrets.__file__)")
    environ = {**os.environ, "PYTHONPATH": str(elsewhere)}
    done = subprocess.run(
        python_program("asked"), cwd=here, env=environ, capture_output=True, text=True
    )
    assert done.stdout.startswith(sysconfig.get_path("stdlib")), done.stderr


def test_a_directory_stands_between_the_library_and_what_is_installed(tmp_path):
    import_from(tmp_path)
    at = sys.path.index(str(tmp_path))
    assert at > sys.path.index(sysconfig.get_path("stdlib"))
    assert at < sys.path.index(sysconfig.get_path("purelib"))


def test_a_directory_on_the_path_keeps_its_place(tmp_path):
    sys.path.append(str(tmp_path))
    before = list(sys.path)
    import_from(tmp_path)
    assert sys.path == before


def test_without_a_library_on_the_path_a_directory_is_first(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", ["elsewhere"])
    import_from(tmp_path)
    assert sys.path == [str(tmp_path), "elsewhere"]


def test_a_child_finds_what_this_process_does(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", ["", "elsewhere"])
    monkeypatch.chdir(tmp_path)
    assert import_paths() == f"{tmp_path}:elsewhere"
