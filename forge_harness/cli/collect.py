"""Asks pytest which checks have a test."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forge_harness.cli.github import not_obeyed
from forge_harness.cli.terminal import say
from forge_harness.errors import ExitCode, ForgeError, UsageError
from forge_harness.record import ItemRecord
from forge_harness.types import Profile

TIMEOUT_S = 120


def collected_marks(suite_paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns the mark of each collected test, over the shipped suites and the user's.

    What cannot be collected is told on standard error: whatever tests it holds look unwritten.

    Raises:
        UsageError: What the collection reads, a policy or a catalogue, is refused.
        ForgeError: Collection ended without an answer; the sentence has pytest's last line.
    """
    from forge_harness.integration.check_stage import pytest_command
    from forge_harness.integration.child import scrubbed_environment
    from forge_harness.integration.pytest_events import Events
    from forge_harness.paths import suites_dir

    with tempfile.TemporaryDirectory(prefix="forge-collect-") as scratch:
        told: list[ItemRecord] = []
        events = Events(Path(scratch) / "events.jsonl", told.append)
        # Nightly is the widest scope: a check outside the default profile has a test too.
        command = pytest_command(
            [suites_dir(), *suite_paths],
            "--collect-only",
            "-q",
            "--continue-on-collection-errors",
            "--forge-events",
            str(events.path),
            "--forge-profile",
            Profile.NIGHTLY.value,
        )
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
                env=scrubbed_environment(),
            )
        except subprocess.TimeoutExpired as error:
            raise ForgeError(f"Collecting the checks took over {TIMEOUT_S} s.") from error
        events.read()
    if events.finished is None:
        lines = (done.stdout + done.stderr).strip().splitlines()
        if lines and done.returncode == ExitCode.USAGE:
            # Of a policy or a catalogue that the collection reads: its sentence is whole.
            raise UsageError(lines[-1].removeprefix("ERROR: "))
        raise ForgeError(f"Collecting the checks failed: {lines[-1] if lines else 'no output'}.")
    for item in told:
        # Nothing ran, so each test that was collected is told of too, as one that never did.
        if item.nodeid not in events.marks:
            say(f"Not collected: {not_obeyed(f'{item.nodeid} {item.reason}')}")
    return list(events.marks.values())
