"""What the pipeline does in processes of its own: load the subject, train the quality study.

    python -m forge_harness.integration.pipeline_child probe SPEC OUT
    python -m forge_harness.integration.pipeline_child study SPEC OUT PROFILE WORKERS

A subject is foreign code: it may end the process, hang or use all memory.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from forge_harness.errors import ForgeError
from forge_harness.integration import lifeline
from forge_harness.probes.masking import Masker

PROGRESS = "forge-progress "
"""Start of a line on standard output that says how far the study is."""


def probe(spec: str) -> dict[str, Any]:
    """Returns what a run records of a subject.

    Raises:
        SubjectError: It cannot be loaded.
    """
    from forge_harness.subject.loader import load_subject

    loaded = load_subject(spec)
    return {
        "spec": loaded.spec,
        "name": loaded.name,
        "capabilities": sorted(loaded.capabilities),
        "digest": loaded.digest,
    }


def study(spec: str, out: Path, profile: str, workers: int) -> None:
    """Trains the quality study and writes it to `out`; tells of each run on standard output."""
    from forge_harness.integration.quality_study import obtain_study

    def tell(label: str, done: int, total: int) -> None:
        print(f"{PROGRESS}{json.dumps([label, done, total])}", flush=True)  # noqa: T201 - protocol

    obtain_study(spec, profile, out, workers=workers or None, progress=tell)


def write_error(out: Path, reason: str) -> None:
    """Leaves the reason where the result was to be."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"error": Masker().text(reason)}), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Does one of the two; the exit status is 0 when the result is in OUT."""
    what, spec, out = arguments[0], arguments[1], Path(arguments[2])
    try:
        if what == "probe":
            out.write_text(json.dumps(probe(spec)), encoding="utf-8")
        else:
            study(spec, out, arguments[3], int(arguments[4]))
    except ForgeError as error:
        write_error(out, str(error))
        return int(error.exit_code)
    except Exception as error:
        traceback.print_exc()
        write_error(out, f"{type(error).__name__}: {error}")
        return 3
    return 0


if __name__ == "__main__":
    lifeline.watch()
    exit_status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # What was asked is done: a thread that the subject left running is not waited for.
    os._exit(exit_status)
