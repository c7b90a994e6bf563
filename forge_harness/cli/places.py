"""Places a command writes to: none of them is one that it reads, or writes something else to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge_harness.durable import is_written_through
from forge_harness.errors import UsageError
from forge_harness.paths import resolved_path


@dataclass(frozen=True, slots=True)
class Place:
    """A file or directory, and the option or argument that names it."""

    named: str
    path: Path


def given(**paths: Path | None) -> list[Place]:
    """Returns the places of the options that were given: `tls_key` is of `--tls-key`."""
    options = ((f"--{name.replace('_', '-')}", path) for name, path in paths.items())
    return [Place(option, path) for option, path in options if path is not None]


def keys_place(source: str | None) -> list[Place]:
    """Returns the keyring file that `--keys` names; none where it names no file."""
    if source is None:
        return []
    from forge_harness.security.key_sources import keyring_path

    return given(keys=keyring_path(source))


def audit_places(path: Path | None) -> list[Place]:
    """Returns the files of the audit log that `--audit` names."""
    if path is None:
        return []
    from forge_harness.security.audit import heads_beside

    return [*given(audit=path), Place("the file of heads of --audit", heads_beside(path))]


def check_apart(writes: Sequence[Place], reads: Sequence[Place] = ()) -> None:
    """Refuses to write where another thing is, or goes: over it, or into a directory of it.

    What is no plain file stays what it is when it is written to, and may be named more than once.

    Args:
        writes: Files and directories the command writes.
        reads: Those it reads, or writes to as its store.

    Raises:
        UsageError: With both.
    """
    for place, other in _pairs(writes, reads):
        if _is_same(place.path, other.path):
            raise UsageError(
                f"{place.named} {str(place.path)!r} is the same file as {other.named} "
                f"{str(other.path)!r}, which it would overwrite; give it another name."
            )
        # What is not there yet may become a directory, and must be empty then.
        inside = resolved_path(other.path) in resolved_path(place.path).parents
        if inside and not other.path.is_file():
            raise UsageError(
                f"{place.named} {str(place.path)!r} lies inside {other.named} "
                f"{str(other.path)!r}, where nothing else may be; put it outside."
            )


def _pairs(writes: Sequence[Place], reads: Sequence[Place]) -> Iterator[tuple[Place, Place]]:
    for number, place in enumerate(writes):
        if not is_written_through(place.path):
            for other in (*reads, *writes[:number]):
                yield place, other


def _is_same(one: Path, other: Path) -> bool:
    if resolved_path(one) == resolved_path(other):
        return True
    # Another name of it: a hard link, or a directory that is mounted twice.
    return one.exists() and other.exists() and one.samefile(other)
