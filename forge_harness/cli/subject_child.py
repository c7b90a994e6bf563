"""What a subject offers, found out in a process of its own.

    python -m forge_harness.cli.subject_child SPEC OUT

A subject is foreign code: loading it may end the process, with exit status 0 even, or hang.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_harness.errors import ExitCode, ForgeError, SubjectError
from forge_harness.imports import python_program
from forge_harness.integration import lifeline
from forge_harness.probes.masking import Masker

_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A subject as the doctor describes it.

    Attributes:
        spec: How to load it again.
        name: Its own name.
        digest: Of the file it came from, or None.
        missing: Capability -> methods it lacks; none for a capability it offers.
    """

    spec: str
    name: str
    digest: str | None
    missing: dict[str, list[str]]


def offer_of(spec: str) -> Offer:
    """Loads a subject in a child process and returns what it offers.

    Raises:
        SubjectError: It cannot be loaded, ended its process, or took too long. The exit code is
            that of the loader's own error.
    """
    from forge_harness.integration.child import Child, Log, describe_status
    from forge_harness.integration.pipeline_validator import SUBJECT_TIMEOUT_S

    with tempfile.TemporaryDirectory(prefix="forge-subject-") as directory:
        out, log = Path(directory) / "offer.json", Log(None)
        deadline = time.monotonic() + SUBJECT_TIMEOUT_S
        with Child([*python_program(__name__), spec, str(out)], log) as child:
            status = None
            while status is None and time.monotonic() < deadline:
                status = child.pump(_POLL_S)
        if status is None:
            raise SubjectError(f"Subject {spec!r} was not loaded within {SUBJECT_TIMEOUT_S:g} s.")
        if not out.is_file():
            said = log.last_line() or "it said nothing"
            raise SubjectError(
                f"Loading subject {spec!r} ended its process ({describe_status(status)}): {said}"
            )
        answer: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if "error" in answer:
        error = SubjectError(answer["error"])
        error.exit_code = ExitCode(answer["exit_code"])
        raise error
    return Offer(**answer)


def describe(spec: str) -> dict[str, Any]:
    """Loads a subject in this process; returns the fields of its `Offer`, or an error.

    Whatever the subject's own code raises, a property included, is the subject's error.
    """
    from forge_harness.protocols import CAPABILITIES, methods_of
    from forge_harness.subject.loader import load_subject

    try:
        found = load_subject(spec)
        missing = {
            name: [m for m in methods_of(name) if not callable(getattr(found.subject, m, None))]
            for name in CAPABILITIES
        }
    except ForgeError as error:
        return _error(str(error), error.exit_code)
    except Exception as error:
        what = f"Subject {spec!r} raised {type(error).__name__} when it was looked at: {error}."
        return _error(what, ExitCode.USAGE)
    return {"spec": found.spec, "name": found.name, "digest": found.digest, "missing": missing}


def _error(sentence: str, code: ExitCode) -> dict[str, Any]:
    return {"error": Masker().text(sentence), "exit_code": int(code)}


if __name__ == "__main__":
    lifeline.watch()
    Path(sys.argv[2]).write_text(json.dumps(describe(sys.argv[1])), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    # What was asked is done: a thread that the subject left running is not waited for.
    os._exit(0)
