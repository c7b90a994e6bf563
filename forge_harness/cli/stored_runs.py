"""The runs that are kept in directories: found, verified, and in the order they were started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from forge_harness.cli.gate import UnfinishedRunError, admitted
from forge_harness.cli.options import load
from forge_harness.cli.terminal import printable, shown
from forge_harness.durable import read_plain
from forge_harness.errors import NothingCollectedError, RunDirectoryError, VerificationError
from forge_harness.paths import resolved_path
from forge_harness.rundir import ITEMS, MANIFEST, POLICY, RUN

if TYPE_CHECKING:
    from forge_harness.policy import Policy
    from forge_harness.record import RunRecord

_OWN_FILES = (RUN, POLICY, ITEMS)
"""Any of them makes a directory that of a run; a package has a manifest too."""
_EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run that verifies."""

    directory: Path
    record: RunRecord
    policy: Policy


@dataclass(frozen=True, slots=True)
class RefusedRun:
    """A run of which nothing is shown but why."""

    directory: Path
    word: str
    """unfinished, damaged, does not verify; or empty, a directory that was named for nothing."""
    reason: str

    @property
    def is_run(self) -> bool:
        """Whether there is a run of which something is not shown."""
        return self.word != _EMPTY

    def line(self) -> str:
        """Returns "forge-runs/x: unfinished: the sentence"."""
        return printable(f"{shown(self.directory)}: {self.word}: {self.reason}")

    def to_json(self) -> dict[str, str]:
        """Returns it as JSON values."""
        return {"directory": shown(self.directory), "state": self.word, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class StoredRuns:
    """What was found: the runs that verify, oldest first, and those that do not, by path."""

    runs: tuple[StoredRun, ...]
    refused: tuple[RefusedRun, ...]


def stored_runs(config_file: Path | None, directories: Sequence[Path]) -> StoredRuns:
    """Finds and verifies runs.

    Args:
        config_file: Configuration whose paths.runs is looked into when no directory is named.
        directories: Runs, and directories that hold runs.

    Raises:
        RunDirectoryError: A directory that was named is not there.
        NothingCollectedError: There is no run in them.
    """
    found = found_runs(config_file, directories)
    if not found.runs and not any(run.is_run for run in found.refused):
        names = ", ".join(shown(place.directory) for place in found.refused)
        raise NothingCollectedError(
            f"No run in {names}; name the directory of a run or one that holds runs "
            "(`forge-harness run` makes one)."
        )
    return found


def found_runs(config_file: Path | None, directories: Sequence[Path]) -> StoredRuns:
    """Finds and verifies runs as `stored_runs` does, also where there is none.

    Raises:
        RunDirectoryError: A directory that was named is not there.
    """
    named = tuple(directories)
    where = named or _default(config_file)
    found: dict[Path, Path] = {}
    refused: list[RefusedRun] = []
    for directory in where:
        if named and not directory.is_dir():
            what = "is a file" if directory.exists() else "does not exist"
            raise RunDirectoryError(
                f"{directory} {what}; expected the directory of a run, or one that holds runs."
            )
        runs = _runs_in(directory)
        if not runs:
            refused.append(RefusedRun(directory, _EMPTY, "there is no run in it."))
        for run in runs:
            found.setdefault(resolved_path(run), run)
    read = [_read(run) for run in sorted(found.values())]
    refused += [run for run in read if isinstance(run, RefusedRun)]
    verified = [run for run in read if isinstance(run, StoredRun)]
    return StoredRuns(runs=tuple(sorted(verified, key=_order)), refused=tuple(refused))


def _default(config_file: Path | None) -> tuple[Path, ...]:
    place = load(config_file).path("paths.runs")
    return () if place is None else (place,)


def _runs_in(directory: Path) -> list[Path]:
    """Returns the directory itself where it is that of a run, else those of runs in it."""
    if not directory.is_dir():
        return []
    if is_run(directory):
        return [directory]
    return [path for path in sorted(directory.iterdir()) if path.is_dir() and is_run(path)]


def is_run(directory: Path) -> bool:
    """Whether a directory is that of a run, be it a damaged one."""
    try:
        names = {path.name for path in directory.iterdir()}
    except PermissionError:
        return True  # nobody knows: it is listed, as what cannot be read
    return any(name in names for name in _OWN_FILES) or (
        MANIFEST in names and _is_of_a_run(directory / MANIFEST)
    )


def _is_of_a_run(manifest: Path) -> bool:
    """Whether a manifest names the files of a run; that of a package names others."""
    try:
        files = json.loads(read_plain(manifest))["files"]
        return any(entry["path"] in _OWN_FILES for entry in files)
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return False


def _read(directory: Path) -> StoredRun | RefusedRun:
    try:
        return StoredRun(directory, *admitted(directory))
    except UnfinishedRunError as error:
        return RefusedRun(directory, "unfinished", _reason(error, directory))
    except VerificationError as error:
        is_damaged = isinstance(error.__cause__, RunDirectoryError)
        word = "damaged" if is_damaged else "does not verify"
        return RefusedRun(directory, word, _reason(error, directory))
    except RunDirectoryError as error:
        return RefusedRun(directory, "damaged", _reason(error, directory))
    except OSError as error:
        return RefusedRun(directory, "damaged", f"it cannot be read: {error.strerror}")


def _reason(error: Exception, directory: Path) -> str:
    return str(error).removeprefix("Refused: ").removeprefix(f"{directory} does not verify: ")


def _order(run: StoredRun) -> tuple[float, str, str]:
    started = datetime.fromisoformat(run.record.started_at).timestamp()
    return started, run.record.run_id, str(run.directory)
