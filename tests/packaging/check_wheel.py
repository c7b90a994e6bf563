"""Builds the wheel, checks what is in it, and runs it outside the checkout.

    python tests/packaging/check_wheel.py [--wheel FILE] [--out DIR]

Without --wheel it builds one from this checkout with `pip wheel --no-deps`. Prints each problem on
a line and exits 1 when there is any. Needs the dependencies of the project in this interpreter.
"""

from __future__ import annotations

import argparse
import os
import site
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {"forge_harness", "forge_kernels"}
REQUIRED = (
    "forge_harness/__init__.py",
    "forge_harness/py.typed",
    "forge_harness/plugin.py",
    "forge_harness/suites/catalogue.toml",
    "forge_harness/suites/policy.toml",
    "forge_kernels/__init__.py",
    "forge_kernels/_native.pyi",
    "forge_kernels/csrc/cuda/ternary_gemv.cu",  # compiled by NVRTC where it is first used
    "forge_kernels/py.typed",
    "forge_kernels/reference.py",
)
ENTRY_POINTS = ("forge-harness = forge_harness.cli:main", "forge_harness = forge_harness.plugin")
SMOKE = """
import sys, tomllib, torch, forge_harness
from forge_harness import kernels, paths, quant
assert forge_harness.__file__.startswith(sys.argv[1]), forge_harness.__file__
assert str(paths.suites_dir()).startswith(sys.argv[1]), paths.suites_dir()
assert tomllib.loads((paths.suites_dir() / "catalogue.toml").read_text())["check"]
assert kernels.which("pack_i2") == "native", kernels.native_problem()
codes, _ = quant.absmean_ternary(torch.randn(9, 5))
assert torch.equal(quant.unpack_i2(quant.pack_i2(codes), 9), codes)
"""
UNWANTED_PARTS = {"__pycache__", ".pytest_cache", "tests", "csrc"}


def build(folder: Path) -> Path:
    """Builds the wheel into `folder` and returns its path."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def problems(names: set[str], entry_points: str) -> list[str]:
    """Returns what is wrong with a wheel of these file names and entry points."""
    found = [f"{name} is missing" for name in REQUIRED if name not in names]
    tops = {name.split("/")[0] for name in names}
    generic = {top for top in tops - TOP_LEVEL if not top.endswith(".dist-info")}
    found += [f"top-level name {top!r} is not ours to install" for top in sorted(generic)]
    found += [
        f"{name} does not belong in the wheel"
        for name in sorted(names)
        if UNWANTED_PARTS & set(name.split("/")) and name not in REQUIRED
    ]
    if not any(_is_extension(name) for name in names):
        found.append("forge_kernels/_native.*.so, the native extension, is missing")
    found += [f"{name} is missing" for name in sorted(_data_files() - names)]
    found += [
        f"entry point {line!r} is missing" for line in ENTRY_POINTS if line not in entry_points
    ]
    return found


def _is_extension(name: str) -> bool:
    return name.startswith("forge_kernels/_native.") and name.endswith((".so", ".pyd"))


def _data_files() -> set[str]:
    """Names in the wheel of every committed file of suites/ and fixtures/."""
    command = ["git", "-C", str(ROOT), "ls-files", "suites", "fixtures"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return {f"forge_harness/{line}" for line in listed.splitlines()}


def read(wheel: Path) -> tuple[set[str], str]:
    """Returns the file names and the text of entry_points.txt of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        listed = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        return names, "".join(archive.read(name).decode() for name in listed)


def smoke(wheel: Path, folder: Path) -> list[str]:
    """Runs the installed wheel outside the checkout, with the dependencies of this interpreter.

    -S keeps the .pth file of an editable install from putting the checkout in its place.
    """
    target = folder / "installed"
    install = ["install", "-q", "--no-deps", "--no-compile", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    path = os.pathsep.join([str(target), *site.getsitepackages()])
    environment = {**os.environ, "PYTHONPATH": path}
    found = []
    for arguments in (["-c", SMOKE, str(target)], ["-m", "forge_harness", "--help"]):
        result = subprocess.run(
            [sys.executable, "-S", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            last = (result.stderr or result.stdout).strip().splitlines()[-1:]
            found.append(f"`python {arguments[0]} {arguments[1][:40]!r}` fails: {''.join(last)}")
    return found


def main() -> int:
    """Builds unless a wheel is given, checks, reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, help="check this wheel instead of building one")
    parser.add_argument("--out", type=Path, help="keep the built wheel in this directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel or build(options.out or Path(folder))
        found = problems(*read(wheel)) or smoke(wheel, Path(folder))
    for problem in found:
        sys.stdout.write(f"{wheel.name}: {problem}\n")
    if not found:
        sys.stdout.write(f"{wheel.name}: complete, nothing generic, runs outside the checkout\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
