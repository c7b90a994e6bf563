"""doctor: what is here, what the subject offers, which checks that opens."""

import json
import sys
from importlib import util
from pathlib import Path

import pytest

from forge_harness.cli import needs
from forge_harness.errors import ExitCode
from forge_harness.policy import load_policy
from forge_harness.protocols import CAPABILITIES

ROOT = Path(__file__).resolve().parents[2]
SUBJECT = """
class Toy:
    name = "toy"
    def pack(self, codes): ...
    def unpack(self, packed, rows): ...
    def quantize_weight(self, weight): ...
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(SUBJECT)
    return f"{tmp_path / 'toy.py'}:Toy"


def test_the_reference_offers_everything(invoke, monkeypatch):
    monkeypatch.setattr(needs, "NEEDS", ())
    monkeypatch.setenv("FORGE_HARNESS_DECLARED_ACCELERATOR", "none")
    result = invoke("doctor")
    assert result.exit_code == ExitCode.PASS, result.output
    for name in CAPABILITIES:
        line = next(line for line in result.output.splitlines() if line.startswith(name + " "))
        assert line.split()[1] == "offered"
    assert "Nothing is missing." in result.output


def test_every_need_is_of_checks_that_there_are():
    known = {entry.id for entry in load_policy().catalogue}
    named = {check for need in (*needs.NEEDS, needs.ACCELERATOR) for check in need.checks}
    assert named
    assert named <= known


@pytest.mark.parametrize(
    ("hidden", "sentence"),
    [
        ("ruff", "ruff is not here, so security.power_of_ten is not measured; pip install"),
        ("gguf", "gguf is not here, so integration.third_party_readers is not measured; pip"),
        ("strace", "strace is not here, so state.commit_atomic and state.io_errors and"),
    ],
)
def test_what_a_check_calls_and_is_not_here_is_7_with_the_remedy(monkeypatch, hidden, sentence):
    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == hidden else found(name))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    problems = [
        need.problem() for need in needs.missing({}, {e.id for e in load_policy().catalogue})
    ]
    assert any(problem.startswith(sentence) for problem in problems)


def test_advisories_that_are_not_where_they_are_said_to_be_are_missed(monkeypatch, tmp_path):
    """The check reads the database that is named, whatever else is installed."""
    check = "dependencies.known_vulnerabilities"
    monkeypatch.setattr(util, "find_spec", lambda name: sys)
    monkeypatch.setenv("FORGE_HARNESS_ADVISORIES_FILE", str(tmp_path / "database"))
    (need,) = needs.missing({"accelerator": "none"}, {check})
    assert "that FORGE_HARNESS_ADVISORIES_FILE names, else pip-audit) is not here" in need.problem()
    (tmp_path / "database").mkdir()
    assert needs.missing({"accelerator": "none"}, {check}) == []


def test_an_accelerator_is_missed_until_it_is_declared_that_none_is_meant(invoke, monkeypatch):
    monkeypatch.setattr(needs, "NEEDS", ())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = invoke("doctor")
    assert result.exit_code == ExitCode.INCOMPLETE
    assert "An accelerator is not here, so environment.accelerator is not measured" in result.output
    monkeypatch.setenv("FORGE_HARNESS_DECLARED_ACCELERATOR", "none")
    assert invoke("doctor").exit_code == ExitCode.PASS


@pytest.mark.parametrize(("api", "shown"), [("cuda", "CUDA 13.0"), ("hip", "ROCm 13.0")])
def test_a_build_of_torch_without_its_driver_is_named(invoke, monkeypatch, api, shown):
    """Its check is red, and the doctor said that nothing is missing."""
    monkeypatch.setattr(needs, "NEEDS", needs.NEEDS[-1:])
    monkeypatch.setenv("FORGE_HARNESS_DECLARED_ACCELERATOR", "none")
    monkeypatch.setattr(f"torch.version.{api}", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = invoke("doctor")
    assert result.exit_code == ExitCode.INCOMPLETE
    assert f"torch build      {shown}" in result.output
    assert (
        "A driver that runs torch's CUDA or ROCm build is not here, so dependencies.torch_build is "
        "red; install the driver, or torch's CPU build." in result.output
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "one")
    assert invoke("doctor").exit_code == ExitCode.PASS


def test_what_no_open_check_calls_is_not_missed(invoke, toy, monkeypatch):
    gone = needs.Need("x", lambda: False, ("training.parameters_move",), "install it")
    monkeypatch.setattr(needs, "NEEDS", (gone,))
    assert "x is not here" not in invoke("doctor", "--subject", toy).output
    assert "x is not here" in invoke("doctor").output


def test_a_partial_subject_is_7_with_what_it_lacks(invoke, toy):
    result = invoke("doctor", "--subject", toy, "--json")
    assert result.exit_code == ExitCode.INCOMPLETE
    document = json.loads(result.output)
    rows = {row["capability"]: row for row in document["capabilities"]}
    assert rows["Packs"]["offered"] is True
    assert rows["Quantizes"]["missing_methods"] == [
        "integer_linear",
        "linear",
        "quantize_activation",
    ]
    gated = [entry.id for entry in load_policy().catalogue if "Trains" in entry.requires]
    assert rows["Trains"]["checks"] == gated
    assert any(
        problem.startswith(f"Subject 'toy' does not offer Trains: {len(gated)} checks")
        for problem in document["problems"]
    )
    assert (
        "lacks integer_linear, linear, quantize_activation"
        in invoke("doctor", "--subject", toy).output
    )


def test_the_document_shows_what_doctor_says(invoke, tmp_path):
    """Its counts stayed what they were while checks were added."""
    (tmp_path / "toy.py").write_text(
        SUBJECT.replace("    def quantize_weight(self, weight): ...", "")
    )
    said = invoke("doctor", "--subject", f"{tmp_path / 'toy.py'}:Toy").output
    shown = (
        (ROOT / "docs" / "cli.md").read_text().partition("## doctor")[2].partition("## train")[0]
    )
    lines = [line for line in shown.splitlines() if line.partition(" ")[0] in CAPABILITIES]
    assert len(lines) == len(CAPABILITIES)
    assert [line for line in lines if line not in said.splitlines()] == []


def test_a_missing_native_module_is_7_with_the_remedy(invoke, monkeypatch):
    monkeypatch.setattr("forge_harness.kernels.native_problem", lambda: "No module named x")
    result = invoke("doctor")
    assert result.exit_code == ExitCode.INCOMPLETE
    assert "The native module is missing: No module named x; reinstall" in result.output


def test_the_kernel_path_is_shown_and_one_that_does_not_run_is_7(invoke, monkeypatch):
    """Every product ended with it, and nothing was missing."""
    monkeypatch.setattr(needs, "NEEDS", ())
    monkeypatch.setenv("FORGE_HARNESS_DECLARED_ACCELERATOR", "none")
    monkeypatch.setenv("FORGE_KERNELS_PATH", "scalar")
    assert json.loads(invoke("doctor", "--json").output)["environment"]["kernel_path"] == "scalar"
    monkeypatch.setenv("FORGE_KERNELS_PATH", "mmx")
    result = invoke("doctor")
    assert result.exit_code == ExitCode.INCOMPLETE
    assert "Kernel path 'mmx' (from FORGE_KERNELS_PATH) does not run here" in result.output


def test_a_subject_that_is_not_named_is_not_the_reference(invoke):
    """As a shell writes a variable that is not set."""
    result = invoke("doctor", "--subject", "")
    assert result.exit_code == ExitCode.USAGE
    assert "Invalid value for '--subject': It is empty;" in result.stderr


@pytest.mark.parametrize("spec", ["no_such_module:thing", "missing.py:thing", "nosuchentry"])
def test_a_wrong_subject_is_a_usage_error(invoke, spec):
    result = invoke("doctor", "--subject", spec)
    assert result.exit_code == ExitCode.USAGE
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os; os._exit(0)", "ended its process (exit status 0)"),
        ("import sys; sys.exit(0)", "ended its process (exit status 0)"),
        ("import sys; sys.exit('gone')", "ended its process (exit status 1): gone"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import os\nclass X:\n    def __init__(self): os._exit(0)", "exit status 0"),
        ("class X:\n    @property\n    def pack(self): raise ValueError('no pack')", "no pack"),
        (
            "class X:\n    def pack(self, c): ...\n    def unpack(self, p, r): ...\n"
            "    @property\n    def name(self): return 1 / 0",
            "raised ZeroDivisionError",
        ),
    ],
)
def test_a_subject_that_ends_its_process_ends_not_the_doctor(forge, tmp_path, source, said):
    (tmp_path / "bad.py").write_text(source + "\n")
    result = forge("doctor", "--subject", f"{tmp_path / 'bad.py'}:X")
    assert result.returncode == ExitCode.USAGE, result.stderr
    assert said in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_what_a_subject_prints_is_not_in_the_document(forge, tmp_path, toy):
    with (tmp_path / "toy.py").open("a") as stream:
        stream.write("print('hello')\n")
    result = forge("doctor", "--subject", toy, "--json")
    assert json.loads(result.stdout)["subject"]["name"] == "toy"
    assert result.stderr == ""
