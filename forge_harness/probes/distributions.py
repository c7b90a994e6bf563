"""Installed distributions: requirements, recorded hashes, licenses, committed constraints."""

from __future__ import annotations

import base64
import csv
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from email import message_from_string
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, cast

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")

if TYPE_CHECKING:
    from email.message import Message

DISTRIBUTION = "bitnet-forge-harness"
NO_VERSION = "unknown"
"""In place of the version of a distribution that states none: never a clean one."""
LARGE_BYTES = 100_000_000
"""Above it only .py files are hashed: torch alone has over 800 MB of libraries."""


@dataclass(frozen=True, slots=True)
class Unsatisfied:
    """A declared requirement that is not met."""

    requirement: str
    installed: str | None

    def __str__(self) -> str:
        return f"{self.requirement} (installed: {self.installed or 'nothing'})"


def requirements(distribution: str = DISTRIBUTION, extras: Iterable[str] = ()) -> list[Requirement]:
    """Returns the requirements a distribution declares for this interpreter and these extras."""
    declared = map(_requirement, declared_in(metadata.distribution(distribution)))
    chosen = ("", *extras)
    return [
        r
        for r in declared
        if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in chosen)
    ]


def _requirement(text: str) -> Requirement:
    """Returns a declared requirement; of one in a form from before PEP 508 the name alone."""
    try:
        return Requirement(text)
    except InvalidRequirement:
        name = _NAME.match(text)
        if name is None:
            raise
        return Requirement(name.group())


def unsatisfied(wanted: Iterable[Requirement]) -> list[Unsatisfied]:
    """Returns those requirements of which no, or another, version is installed."""
    problems = []
    for requirement in wanted:
        version = installed_version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            problems.append(Unsatisfied(str(requirement), version))
    return problems


def installed_version(name: str) -> str | None:
    """Returns the version of an installed distribution, None without it."""
    try:
        return version_in(metadata.distribution(name))
    except metadata.PackageNotFoundError:
        return None


def version_in(found: metadata.Distribution) -> str:
    """Returns the version a distribution states, `NO_VERSION` where it states none."""
    return str(fields_of(found).get("Version") or NO_VERSION)


def declared_in(found: metadata.Distribution) -> list[str]:
    """Returns the requirements a distribution declares, as it writes them."""
    try:
        return found.requires or []
    except UnicodeDecodeError:
        return fields_of(found).get_all("Requires-Dist") or []


def fields_of(found: metadata.Distribution) -> Message:
    """Returns the metadata of a distribution; letters in them that are not UTF-8 are replaced."""
    # The protocol lacks `get`, which the object, an email message, has had since Python 3.8.
    try:
        return cast("Message", found.metadata)
    except UnicodeDecodeError as error:
        # Old tools wrote an author's name as they pleased. The error holds the whole file.
        return message_from_string(bytes(error.object).decode("utf-8", "replace"))


def committed_pins(directory: Path) -> list[Requirement]:
    """Returns the pins of all constraint files (`*.txt`) of a directory."""
    lines = [
        line.split("#")[0].strip()
        for path in sorted(directory.glob("*.txt"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


@dataclass(slots=True)
class IntegrityReading:
    """How the files of some distributions compare with the hashes recorded at installation."""

    files: int = 0
    size_bytes: int = 0
    altered: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)
    """Installed distributions without one recorded hash: nothing can be said of them."""


def check_integrity(distributions: Iterable[str]) -> IntegrityReading:
    """Hashes the installed files of distributions and compares them with their RECORD."""
    reading = IntegrityReading()
    for name in distributions:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        recorded = list(_recorded(distribution))
        if not recorded:
            reading.unrecorded.append(name)
        for path, mode, expected in recorded:
            _compare(reading, f"{name}: {path.name}", path, mode, expected)
    return reading


def _recorded(distribution: metadata.Distribution) -> Iterator[tuple[Path, str, str]]:
    """Yields path, kind of hash and hash of each file that RECORD has a known hash of.

    From Python 3.12 on `Distribution.files` leaves out what is not there, which is what is sought.
    """
    try:
        rows = list(csv.reader((distribution.read_text("RECORD") or "").splitlines()))
        sizes = [int(row[2]) if len(row) > 2 and row[2] else 0 for row in rows]
    except (ValueError, csv.Error):  # Not UTF-8, or a size that is no number: it records nothing.
        return
    known = hashlib.algorithms_available
    hashes = [(row[1] if len(row) > 1 else "").partition("=") for row in rows]
    hashed = [mode in known for mode, _, _ in hashes]
    large = sum(itertools.compress(sizes, hashed)) > LARGE_BYTES
    for row, (mode, _, value) in itertools.compress(zip(rows, hashes, strict=True), hashed):
        if not large or row[0].endswith(".py"):
            yield Path(str(distribution.locate_file(row[0]))), mode, value


def _compare(reading: IntegrityReading, label: str, path: Path, mode: str, expected: str) -> None:
    try:
        content = path.read_bytes()
    except OSError:
        reading.missing.append(label)
        return
    reading.files += 1
    reading.size_bytes += len(content)
    digest = base64.urlsafe_b64encode(hashlib.new(mode, content).digest()).rstrip(b"=").decode()
    if digest != expected:
        reading.altered.append(label)


def dependency_closure(distribution: str = DISTRIBUTION) -> list[str]:
    """Returns the installed distributions a distribution needs, directly or not, sorted.

    Extras are followed where a requirement asks for them (`uvicorn[standard]`).
    """
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = [(canonicalize_name(distribution), frozenset[str]())]
    while queue:
        name, extras = queue.pop()
        if (name, extras) in seen or installed_version(name) is None:
            continue
        seen.add((name, extras))
        queue += [
            (canonicalize_name(r.name), frozenset(r.extras)) for r in requirements(name, extras)
        ]
    return sorted({name for name, _ in seen} - {canonicalize_name(distribution)})


def license_of(distribution: str) -> str:
    """Returns a distribution's license: SPDX expression, else classifiers, else free text."""
    return license_in(fields_of(metadata.distribution(distribution)))


def license_in(about: Message) -> str:
    """Returns the license that the metadata of a distribution name, as `license_of` does."""
    if expression := about.get("License-Expression"):
        return str(expression)
    named = [
        entry.rpartition(" :: ")[2]
        for entry in about.get_all("Classifier") or []
        if entry.startswith("License ::")
    ]
    specific = [name for name in named if name != "OSI Approved"]
    if specific:
        return "; ".join(specific)
    first_line = (about.get("License") or "").strip().splitlines()
    return first_line[0][:80] if first_line else "unknown"
