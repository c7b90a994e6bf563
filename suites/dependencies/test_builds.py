"""Builds: the native extension, torch, and what starting up imports."""

import sys
from importlib import machinery

import pytest
from packaging.version import InvalidVersion, Version

from forge_harness import kernels
from forge_harness.probes import distributions, startup

HEAVY = ("torch", "numpy", "locust", "gevent", "mlflow", "matplotlib", "sklearn")


@pytest.mark.forge_check("dependencies.native_extension")
def test_native_extension(evidence):
    """The native extension loads, was built for this interpreter, and from this version.

    A stale build after an upgrade computes with old kernels and says nothing.
    """
    problem = kernels.native_problem()
    evidence.equal("problem", problem or "none", expected="none", reason="import of the extension")
    evidence.equal(
        "version",
        kernels.native_version() or "none",
        expected=distributions.installed_version(distributions.DISTRIBUTION) or "none",
        reason="compiled in against installed; reinstall after an upgrade",
    )
    file = str(sys.modules["forge_kernels._native"].__file__)
    evidence.equal(
        "built_for_this_interpreter",
        any(file.endswith(suffix) for suffix in machinery.EXTENSION_SUFFIXES),
        expected=True,
        reason=file.rpartition("/")[2],
    )


@pytest.mark.forge_check("dependencies.torch_build")
def test_torch_build(evidence):
    """The torch build is said, and fits the machine: a CUDA build has a driver that runs it."""
    import torch

    evidence.record("version", torch.__version__, reason="torch")
    runtime = torch.version.cuda or torch.version.hip or "cpu"
    evidence.record("runtime", runtime, reason="CUDA or HIP runtime it was built for")
    installed = _normal(distributions.installed_version("torch") or "none")
    imported = _normal(str(torch.__version__))
    evidence.equal(
        "metadata_version",
        installed,
        # PyPI takes no local part: of a build of CUDA from there only the module has one.
        expected=imported if "+" in installed else imported.partition("+")[0],
        reason=f"what pip installed is what Python imports: {imported}",
    )
    if runtime != "cpu":
        evidence.equal(
            "driver_runs_it",
            torch.cuda.is_available(),
            expected=True,
            reason=f"a build for {runtime} without a driver for it runs on the CPU, unnoticed; "
            "install the driver, or torch's CPU build",
        )


def _normal(version):
    """Returns a version as PEP 440 normalises it, as whoever writes metadata does.

    Vendors' builds say 2.6.0a0+nv25.01 of themselves and 2.6.0a0+nv25.1 in their metadata.
    """
    try:
        return str(Version(version))
    except InvalidVersion:
        return version


@pytest.mark.forge_check("dependencies.import_budget")
@pytest.mark.parametrize(
    "arguments",
    [("-m", "forge_harness", "--help"), ("-c", "import forge_harness.plugin")],
    ids=["command_line", "plugin"],
)
def test_import_budget(arguments, evidence):
    """The command line and the pytest plugin start without the heavy libraries.

    Oracle: the interpreter's own import log. The plugin is imported by every pytest run of the
    environment, whoever's tests they are.
    """
    reading = startup.start(arguments)
    evidence.record(
        "wall", reading.seconds, unit="s", reason="one start, not gated: clocks of CI vary"
    )
    evidence.equal("exit_code", reading.exit_code, expected=0, reason=reading.error or "it started")
    evidence.at_least(
        "modules", len(reading.modules), limit=1, reason="an empty log would prove nothing"
    )
    loaded = sorted(reading.modules & set(HEAVY))
    evidence.equal(
        "heavy_modules",
        len(loaded),
        expected=0,
        unit="modules",
        reason=f"python {' '.join(arguments)}: {', '.join(loaded) or 'none loaded'}",
    )
