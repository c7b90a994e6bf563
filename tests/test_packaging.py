"""What an installation must not do: answer to other people's names, or import torch too early."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA_DIRECTORIES = ("kernels", "suites", "fixtures", "reports", "tests")
HEAVY = ("torch", "numpy", "triton", "locust", "gevent", "matplotlib", "sklearn", "mlflow")


@pytest.mark.parametrize("name", DATA_DIRECTORIES)
def test_data_directories_are_no_packages(name):
    # With an __init__.py the checkout's directory would win over the library of that name on PyPI.
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize("name", DATA_DIRECTORIES)
def test_generic_names_import_nothing_of_ours(name, tmp_path):
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s and s.origin)"
    origin = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path).strip()
    # An editable install leaves a namespace portion (origin None), which loses to any real package.
    assert not origin.startswith(str(ROOT)), f"{name} is importable from {origin}"


@pytest.mark.parametrize("module", ["forge_harness.plugin", "forge_harness.cli", "forge_harness"])
def test_start_up_imports_nothing_heavy(module):
    code = f"import {module}, sys; print(*[n for n in {HEAVY!r} if n in sys.modules])"
    imported = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert imported == [], (
        f"{module} imports {imported} at start-up: import them where they are used"
    )


def test_help_imports_nothing_heavy():
    code = (
        "import sys, runpy, contextlib, io\n"
        "sys.argv = ['forge-harness', '--help']\n"
        "from forge_harness.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main()\n"
        f"print(*[n for n in {HEAVY!r} if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []


def test_the_native_extension_is_there_and_of_this_version():
    from forge_harness import kernels

    assert kernels.native_problem() == "", "reinstall with a C++17 compiler: pip install -e ."


def test_every_dependency_in_the_wheel_metadata_is_a_floor():
    # Exact versions belong in constraints/: a pin here would fight the user's torch build.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [line for line in project["dependencies"] if "==" in line] == []


@pytest.fixture(scope="module")
def check_wheel():
    spec = importlib.util.spec_from_file_location(
        "check_wheel", ROOT / "tests" / "packaging" / "check_wheel.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def complete_wheel(check_wheel) -> set[str]:
    extension = "forge_kernels/_native.cpython-311-x86_64-linux-gnu.so"
    return {*check_wheel.REQUIRED, *check_wheel._data_files(), extension, "x-1.dist-info/RECORD"}


def test_the_wheel_check_passes_a_complete_wheel(check_wheel):
    entry_points = "\n".join(check_wheel.ENTRY_POINTS)
    assert check_wheel.problems(complete_wheel(check_wheel), entry_points) == []


@pytest.mark.parametrize(
    ("add", "remove", "words"),
    [
        ("kernels/x.py", None, "'kernels' is not ours"),
        ("forge_harness/tests/x.py", None, "does not belong"),
        (None, "forge_harness/suites/catalogue.toml", "catalogue.toml is missing"),
        (None, "forge_kernels/_native.cpython-311-x86_64-linux-gnu.so", "native extension"),
    ],
)
def test_the_wheel_check_names_what_is_wrong(check_wheel, add, remove, words):
    names = complete_wheel(check_wheel) - {remove} | ({add} if add else set())
    (problem, *_) = check_wheel.problems(names, "\n".join(check_wheel.ENTRY_POINTS))
    assert words in problem


def test_the_wheel_check_misses_no_entry_point(check_wheel):
    found = check_wheel.problems(complete_wheel(check_wheel), "")
    assert len(found) == len(check_wheel.ENTRY_POINTS)
