"""The environment record: which machine, interpreter and packages a run measured on."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from forge_harness.probes.cgroup import cpu_quota

PACKAGES = (
    "bitnet-forge-harness",
    "torch",
    "numpy",
    "pytest",
    "pytest-xdist",
    "pydantic",
    "safetensors",
    "scikit-learn",
)
_GIT_TIMEOUT_S = 5


def collect_environment(directory: Path | None = None) -> dict[str, Any]:
    """Returns what a later reader needs to judge whether two runs compare, as JSON values.

    Nothing that names a person: no host name, no user name, no paths. Torch is not imported;
    its version comes from its metadata.

    Args:
        directory: Whose git commit is recorded; the current directory when None.
    """
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "os": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count() or 0,
        "cpu_usable": _usable_cpus(),
        "cpu_quota": cpu_quota(),
        "memory_bytes": _memory_bytes(),
        "packages": _packages(),
        "nvidia_driver": _nvidia_driver(),
        "encoding": sys.getfilesystemencoding(),
        **_git(directory or Path.cwd()),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"model name", "Model", "cpu model"}:
                return value.strip()
    return platform.processor() or "unknown"


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 0


def _memory_bytes() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().total)


def _packages() -> dict[str, str]:
    from forge_harness.probes.distributions import installed_version

    found = {name: installed_version(name) for name in PACKAGES}
    return {name: version for name, version in found.items() if version is not None}


def _nvidia_driver() -> str | None:
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        return text.splitlines()[0].strip() or None
    return None


def _git(directory: Path) -> dict[str, Any]:
    commit = _git_output(directory, "rev-parse", "HEAD")
    if commit is None:
        return {"git_commit": None, "git_dirty": None}
    changed = _git_output(directory, "status", "--porcelain", "--untracked-files=no")
    return {"git_commit": commit, "git_dirty": None if changed is None else bool(changed)}


def _git_output(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            # Without the lock: a commit that the user makes meanwhile would be refused.
            ["git", "--no-optional-locks", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
