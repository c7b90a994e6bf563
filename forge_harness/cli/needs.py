"""What checks call that is no dependency of the harness, for `forge-harness doctor`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import util

EXTRA = "pip install 'bitnet-forge-harness[checks]'"


@dataclass(frozen=True, slots=True)
class Need:
    """A program, library or fact, and the checks that are not measured without it."""

    name: str
    there: Callable[[], bool]
    checks: tuple[str, ...]
    remedy: str
    fails: bool = False
    """Whether the checks are red without it, where others are not measured."""

    def problem(self) -> str:
        """Returns the sentence that says what is missing and what that costs."""
        be = "is" if len(self.checks) == 1 else "are"
        return (
            f"{self.name} is not here, so {' and '.join(self.checks)} "
            f"{be} {'red' if self.fails else 'not measured'}; {self.remedy}."
        )


def _module(name: str) -> Callable[[], bool]:
    return lambda: util.find_spec(name) is not None


def _advisories() -> bool:
    from forge_harness.probes.advisories import FILE_VARIABLE

    # Where one is named, nothing else is asked.
    if named := os.environ.get(FILE_VARIABLE):
        return os.path.exists(named)
    return util.find_spec("pip_audit") is not None


def _ruff() -> bool:
    from forge_harness.security.scan_tools import find_tool

    return find_tool("ruff") is not None


def _accelerator() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def _driver() -> bool:
    """Whether torch's build runs: one for the CPU needs no driver."""
    try:
        import torch
    except ImportError:
        return True
    is_for_gpu = torch.version.cuda or torch.version.hip
    return not is_for_gpu or bool(torch.cuda.is_available())


NEEDS = (
    *(
        Need(name, _module(name), ("integration.third_party_readers",), EXTRA)
        for name in ("transformers", "gguf")
    ),
    Need("ruff", _ruff, ("security.power_of_ten",), EXTRA),
    Need("lizard", _module("lizard"), ("security.power_of_ten",), EXTRA),
    Need(
        "An advisory database (that FORGE_HARNESS_ADVISORIES_FILE names, else pip-audit)",
        _advisories,
        ("dependencies.known_vulnerabilities",),
        f"{EXTRA}, or let the variable name one",
    ),
    Need(
        "strace",
        lambda: shutil.which("strace") is not None,
        ("state.commit_atomic", "state.io_errors", "state.migration_golden"),
        "apt-get install strace",
    ),
    Need(
        "A driver that runs torch's CUDA or ROCm build",
        _driver,
        ("dependencies.torch_build",),
        "install the driver, or torch's CPU build",
        fails=True,
    ),
)
ACCELERATOR = Need(
    "An accelerator",
    _accelerator,
    ("environment.accelerator",),
    "where none is meant to be here, set [declared] accelerator = 'none'",
)


def missing(declared: Mapping[str, str], checks: Collection[str]) -> list[Need]:
    """Returns what is not here of what checks call.

    Args:
        declared: `[declared]` of the configuration. Whether a declared accelerator is there is the
            check's to say.
        checks: Those the subject's capabilities open.
    """
    undeclared = declared.get("accelerator", "auto") == "auto"
    needs = (*NEEDS, ACCELERATOR) if undeclared else NEEDS
    return [need for need in needs if not set(need.checks).isdisjoint(checks) and not need.there()]
