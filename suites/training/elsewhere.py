"""Makes a part of a run in another process: what lives on in this one only is not there.

The other process has another hash seed, and loads the subject anew by the name it was given. A
subject that was handed over as an object has no such name; it goes there by pickle, as it was
before the check began.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from . import rerun

TIMEOUT_S = 240.0
"""Longest wait: torch's import takes 4 s on an idle machine, and 80 s on one loaded ten times."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """How the subject reaches another process.

    Attributes:
        spec: What `load_subject` is given there; None when the subject goes by pickle.
        pickled: The subject.
        modules: Name and file of what the pickle refers to.
        obstacle: Why it cannot get there; empty when it can.
    """

    spec: str | None = None
    pickled: bytes = b""
    modules: tuple[tuple[str, str], ...] = ()
    obstacle: str = ""

    def run(
        self,
        directory: Path,
        task: str,
        options: Any,
        *,
        steps: int,
        checkpoint: Path | None = None,
    ) -> dict[str, Any]:
        """Returns the result of the job, see `rerun`; `failed` and `error` when it has none."""
        if self.obstacle:
            return {"failed": "loading", "error": self.obstacle}
        directory.mkdir(mode=0o700)
        job = {
            "spec": self.spec,
            "pickled": self.pickled,
            "modules": list(self.modules),
            "task": task,
            "options": options,
            "steps": steps,
            "checkpoint": None if checkpoint is None else str(checkpoint.resolve()),
            "threads": torch.get_num_threads(),
        }
        (directory / rerun.JOB).write_bytes(pickle.dumps(job))
        done = subprocess.run(
            [sys.executable, "-P", str(Path(rerun.__file__).resolve()), str(directory)],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
        file = directory / rerun.RESULT
        if not file.is_file():
            return {"failed": "running", "error": f"code {done.returncode}: {done.stderr[-300:]}"}
        return json.loads(file.read_text(encoding="utf-8"))


def by_name(spec: str) -> Elsewhere:
    """Returns how a subject gets there that was loaded by a name."""
    return Elsewhere(spec=spec)


def by_pickle(subject: Any) -> Elsewhere:
    """Returns how a subject gets there that is known as an object only."""
    try:
        return Elsewhere(pickled=pickle.dumps(subject), modules=tuple(_modules(subject)))
    except Exception as error:
        # `__reduce__` and `__getstate__` of a subject may raise anything.
        return Elsewhere(obstacle=f"pickling the subject raised {type(error).__name__}: {error}")


def _modules(subject: Any) -> list[tuple[str, str]]:
    parts = [base.__module__ for base in reversed(type(subject).__mro__)]
    parts += [
        value.__module__
        for value in getattr(subject, "__dict__", {}).values()
        if isinstance(value, FunctionType | type)
    ]
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in parts}
    return [(name, file) for name, file in files.items() if file and name != "__main__"]


def _environment() -> dict[str, str]:
    here = os.environ.get("PYTHONHASHSEED")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONHASHSEED": "2" if here == "1" else "1",
    }
