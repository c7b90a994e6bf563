"""Where this process and the Python processes it starts import modules from."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path


def python_program(module: str) -> list[str]:
    """Returns the start of the command line that runs a module as a program.

    `-P` keeps the working directory off the front of the path: a `types.py` there would be
    imported for the standard library's. What has to find the user's modules calls `import_from`.
    """
    return [sys.executable, "-P", "-m", module]


def import_from(directory: Path) -> None:
    """Has this process find the modules of a directory, before those of installed packages.

    The standard library stays in front: no module of the user's stands in for one of its. A
    directory that is on the path keeps its place.
    """
    entry = str(directory)
    if entry not in sys.path:
        sys.path.insert(_after_standard_library(), entry)


def import_paths() -> str:
    """Returns the value of PYTHONPATH with which a child finds what this process does."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def _after_standard_library() -> int:
    own = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    own |= {os.path.join(path, "lib-dynload") for path in own}
    return 1 + max((n for n, path in enumerate(sys.path) if path in own), default=-1)
