"""The public surface: frozen, lazy, and the same in the package, its stubs and its metadata."""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import forge_harness

FROZEN = [
    "BackendUnavailableError",
    "ConfigError",
    "Evidence",
    "ExitCode",
    "ForgeError",
    "NonFiniteError",
    "NonTernaryCodeError",
    "NothingCollectedError",
    "Phase4Connector",
    "Phase6Preparer",
    "PipelineValidator",
    "Policy",
    "QualityCoordinator",
    "RunDirectoryError",
    "RunRecord",
    "StateManager",
    "SubjectError",
    "UsageError",
    "VerificationError",
    "__version__",
    "load_policy",
    "load_subject",
]
"""A name leaves this list only with a deprecation; a new one is a decision, not a side effect."""
HEAVY = ("torch", "numpy", "pydantic", "matplotlib", "sklearn", "click", "pytest")


def test_the_public_names_are_exactly_these():
    assert sorted(forge_harness.__all__) == FROZEN


@pytest.mark.parametrize("name", FROZEN)
def test_each_public_name_resolves(name):
    assert getattr(forge_harness, name) is not None
    assert name in dir(forge_harness)


def test_a_component_is_the_class_of_its_module():
    module = importlib.import_module("forge_harness.integration.quality_coordinator")
    assert forge_harness.QualityCoordinator is module.QualityCoordinator


def test_type_checkers_see_the_same_names_as_the_interpreter():
    tree = ast.parse(Path(forge_harness.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname: f"{node.module}".removeprefix("forge_harness.")
        for node in guarded.body
        for alias in node.names
    }
    assert typed == forge_harness._HOMES
    assert {"__version__", *typed} == set(FROZEN)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Phase9Connector'"):
        forge_harness.Phase9Connector  # noqa: B018 - the access is what is tested


def test_submodules_of_functions_need_no_import_of_their_own():
    code = "import forge_harness; print(forge_harness.quant.absmean_ternary.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "absmean_ternary\n"


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys; before = set(sys.modules); import forge_harness; "
        f"print(sorted((set(sys.modules) - before) & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_version_is_that_of_the_distribution():
    assert forge_harness.__version__ == version("bitnet-forge-harness")
