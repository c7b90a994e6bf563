"""Programs that analyse source: found, run with a limit, and never believed for their exit code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import util
from pathlib import Path

TIMEOUT_S = 300.0
_VERSION_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ToolRun:
    """What a program answered.

    Attributes:
        command: Its command line.
        exit_code: None when it did not end in time or could not start.
        stdout: What it printed.
        stderr: What it complained of.
    """

    command: tuple[str, ...]
    exit_code: int | None
    stdout: str
    stderr: str

    def last_words(self) -> str:
        """Returns the last line of its complaint, for a message."""
        lines = self.stderr.strip().splitlines()
        return lines[-1][:200] if lines else f"exit code {self.exit_code}, no message"


def find_tool(name: str) -> tuple[str, ...] | None:
    """Returns the command of a program, this interpreter's own before one on the path.

    Args:
        name: Of the program; its Python module has the same name with "_" for "-".
    """
    module = name.replace("-", "_")
    if util.find_spec(module) is not None and util.find_spec(f"{module}.__main__") is not None:
        # -P: a file of the tree it runs in (types.py) would be imported for the library's.
        return (sys.executable, "-P", "-m", module)
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    return (found,) if found else None


@lru_cache(maxsize=32)
def tool_version(command: tuple[str, ...]) -> str:
    """Returns the first thing that looks like a version in what `--version` prints."""
    answer = run_tool([*command, "--version"], timeout_s=_VERSION_TIMEOUT_S)
    match = re.search(r"\d+(\.\d+)+\S*", answer.stdout)
    return match.group() if match else "unknown"


def run_tool(
    command: Sequence[str], *, timeout_s: float = TIMEOUT_S, cwd: Path | None = None
) -> ToolRun:
    """Runs a program to its end, or to the time limit; its input is empty.

    Args:
        command: Program and arguments; no shell reads them.
        timeout_s: Seconds.
        cwd: Where it runs.
    """
    try:
        done = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            cwd=cwd,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ToolRun(tuple(command), None, "", f"no answer within {timeout_s:g} s")
    except OSError as error:
        return ToolRun(tuple(command), None, "", f"cannot start: {error}")
    return ToolRun(tuple(command), done.returncode, done.stdout, done.stderr)
