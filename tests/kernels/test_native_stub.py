"""The committed stub is what nanobind makes of the extension."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "packaging" / "native_stub.py"


def test_the_committed_stub_is_current():
    result = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (
        f"{result.stderr}\nrun: python tests/packaging/native_stub.py --write"
    )
