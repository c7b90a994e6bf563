"""`python -P -m forge_harness._pytest` is pytest, which finds the modules of the working directory.

`python -m pytest` has that directory in front of the standard library, in xdist's workers too.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from forge_harness.imports import import_from


class Workers:
    """Starts xdist's workers as this process was started, with `-P`."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_setupnodes(self, specs: Sequence[Any]) -> None:
        """Names the interpreter of each worker, a local process."""
        for spec in specs:
            spec.python = f"{shlex.quote(sys.executable)} -P"


if __name__ == "__main__":
    import_from(Path.cwd())
    raise SystemExit(pytest.main(plugins=[Workers()]))
