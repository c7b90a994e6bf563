"""Regenerates the type stub of the native module and compares it with the committed one.

    python tests/packaging/native_stub.py            # exit 1 and a diff when it is stale
    python tests/packaging/native_stub.py --write    # rewrite it, after changing bindings.cpp

Needs nanobind and ruff, and the extension built from the current sources (reinstall first).
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "kernels" / "forge_kernels" / "_native.pyi"


def generate() -> str:
    """Returns the stub of the installed extension, formatted as the project is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / STUB.name
        stubgen = ["nanobind.stubgen", "-q", "-m", "forge_kernels._native", "-o", str(path)]
        _python(*stubgen)
        config = ["--config", str(ROOT / "pyproject.toml")]
        _python("ruff", "check", "--silent", "--fix", "--exit-zero", *config, str(path))
        _python("ruff", "format", "-q", *config, str(path))
        return path.read_text()


def difference() -> str:
    """Returns the unified diff from the committed to the generated stub, empty when equal."""
    committed = STUB.read_text().splitlines(keepends=True)
    generated = generate().splitlines(keepends=True)
    return "".join(difflib.unified_diff(committed, generated, "committed", "generated"))


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def main() -> int:
    """Compares or rewrites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the committed stub")
    if parser.parse_args().write:
        STUB.write_text(generate())
        return 0
    diff = difference()
    sys.stderr.write(diff)
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())
