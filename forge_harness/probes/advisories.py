"""Known vulnerabilities of installed distributions, with three answers: clean, found, not scanned.

A scanner that scanned nothing says "no vulnerabilities found" as well. So the scan is given one
release more than is installed, the canary, whose advisory every live database has; an answer
without it counts as no scan.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import util
from itertools import product
from pathlib import Path
from typing import Any, Literal

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from forge_harness.probes import advisory_directory

CANARY = ("jinja2", "2.4.1")
"""Subject of PYSEC-2014-8 (CVE-2014-1402)."""
FILE_VARIABLE = "FORGE_HARNESS_ADVISORIES_FILE"
MAX_AGE_DAYS = 30
"""PyPI gets new advisories every week: a file whose newest is older is not live data."""
_CLOCKS_DIFFER_DAYS = 1
_NO_LIMIT = "*"
_TIMEOUT_S = 90


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What an advisory scan found."""

    state: Literal["clean", "found", "not scanned"]
    source: str
    scanned: int
    findings: tuple[str, ...]
    """`distribution version: advisory id`, canary excluded."""
    why_not: str = ""
    age_days: float | None = None
    """Since the newest advisory of a file was modified; None for a service."""


def scan(
    installed: Mapping[str, str],
    environ: Mapping[str, str] | None = None,
    database: Path | None = None,
) -> ScanResult:
    """Scans distributions against an advisory database, or through pip-audit when it is installed.

    Args:
        installed: Distribution name -> version.
        environ: Where `FORGE_HARNESS_ADVISORIES_FILE` is looked up when no database is given.
        database: A JSON list of OSV records; a zip archive of one record a file, which is how OSV
            publishes an ecosystem; or a directory of records (JSON, or the YAML of
            github.com/pypa/advisory-database).
    """
    variables = os.environ if environ is None else environ
    queried: dict[str, str] = {
        canonicalize_name(name): version for name, version in installed.items()
    }
    if named := database or variables.get(FILE_VARIABLE):
        return _from_file(Path(named), queried)
    if util.find_spec("pip_audit") is not None:
        return _from_pip_audit(queried)
    return _not_scanned(
        "none", f"no advisory data: set {FILE_VARIABLE} to an OSV database or install pip-audit"
    )


def _not_scanned(source: str, why: str, age_days: float | None = None) -> ScanResult:
    return ScanResult("not scanned", source, 0, (), why, age_days)


def _verdict(
    source: str, queried: Mapping[str, str], hits: Iterable[tuple[str, str, str]]
) -> ScanResult:
    found = sorted(set(hits))
    if not any((name, version) == CANARY for name, version, _ in found):
        return _not_scanned(source, f"the scan did not find its canary {CANARY[0]} {CANARY[1]}")
    # Who has the canary itself installed is told.
    real = tuple(f"{n} {v}: {i}" for n, v, i in found if (n, v) != CANARY or queried.get(n) == v)
    return ScanResult("found" if real else "clean", source, len(queried), real)


def _from_file(path: Path, queried: Mapping[str, str]) -> ScanResult:
    source = f"advisory file {path.name}"
    try:
        if path.is_dir():
            source = f"advisory directory {path.name}"
            records, newest = advisory_directory.read(path, {*queried, CANARY[0]})
        else:
            records = _read_records(path)
            newest = max((advisory_directory.modified(r) for r in records), default=None)
        records = [record for record in records if record.get("withdrawn") is None]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return _not_scanned(source, f"{path.name} cannot be read: {error}")
    except RecursionError:
        return _not_scanned(source, f"{path.name} cannot be read: it is nested too deeply")
    if newest is None:
        return _not_scanned(source, f"{path.name} holds no advisory")
    age = (datetime.now(UTC) - newest).total_seconds() / 86400
    if age > MAX_AGE_DAYS:
        why = f"its newest advisory is {age:.0f} days old, live data are at most {MAX_AGE_DAYS}"
        return _not_scanned(source, why, age)
    if age < -_CLOCKS_DIFFER_DAYS:
        why = f"its newest advisory is {-age:.0f} days in the future, so its age is not known"
        return _not_scanned(source, why, age)
    releases = [*queried.items(), CANARY]
    hits, doubts = _covered(records, releases)
    result = replace(_verdict(source, queried, hits), age_days=age)
    return _not_scanned(source, doubts[0], age) if doubts and result.state == "clean" else result


def _covered(
    records: Iterable[Mapping[str, Any]], releases: Sequence[tuple[str, str]]
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Returns (name, version, advisory) of what is covered, and why others cannot be told."""
    hits: list[tuple[str, str, str]] = []
    doubts: list[str] = []
    for record in records:
        advisory = str(record.get("id", "?"))
        entries = record.get("affected") or []
        if not isinstance(entries, list):
            doubts.append(f"what {advisory} affects is not as OSV has it: {type(entries).__name__}")
            continue
        for affected, (name, version) in product(entries, releases):
            try:
                if _affects(affected, name, version):
                    hits.append((name, version, advisory))
            except InvalidVersion as error:
                doubts.append(f"{name} {version} cannot be compared with {advisory}: {error}")
            except LookupError as error:
                doubts.append(f"{name} {version} cannot be compared with {advisory}: {error}")
            except (AttributeError, TypeError) as error:
                doubts.append(f"what {advisory} affects is not as OSV has it: {error}")
    return hits, doubts


def _read_records(path: Path) -> list[dict[str, Any]]:
    if not zipfile.is_zipfile(path):
        found = json.loads(path.read_text(encoding="utf-8"))
    else:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".json")]
            found = [json.loads(archive.read(name)) for name in names]
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise ValueError("expected a JSON list of OSV records")
    return found


def _affects(affected: Mapping[str, Any], name: str, version: str) -> bool:
    """Whether an OSV `affected` entry covers a release (OSV schema 1.6, evaluation algorithm).

    Raises:
        InvalidVersion: The release, or an event of the entry, cannot be put in order.
        LookupError: The entry names releases in ways that are not read here only.
        AttributeError, TypeError: The entry is of another form.
    """
    package = affected.get("package") or {}
    if package.get("ecosystem") != "PyPI" or canonicalize_name(package.get("name", "")) != name:
        return False
    listed, spans = affected.get("versions") or [], affected.get("ranges") or []
    if version in listed:
        return True
    ranges = [span for span in spans if span.get("type") == "ECOSYSTEM"]
    if spans and not (listed or ranges):
        raise LookupError("its ranges are of no versions of PyPI")
    # A build of a release (2.13.0+cpu) is that release; by PEP 440 it sorts behind it.
    release = Version(Version(version).public)
    return any(_is_release(text, release) for text in listed) or any(
        _in_range(span, release) for span in ranges
    )


def _is_release(text: str, release: Version) -> bool:
    """Whether a listed version is a release, however it is spelled; old ones follow no rules."""
    try:
        return Version(text) == release
    except InvalidVersion:
        return False


def _in_range(span: Mapping[str, Any], version: Version) -> bool:
    events = span.get("events") or []
    limits = [str(event["limit"]) for event in events if "limit" in event]
    if limits and not any(limit == _NO_LIMIT or version < Version(limit) for limit in limits):
        return False
    inside = False
    # OSV leaves their order open; the algorithm wants them by version.
    for event in sorted((e for e in events if "limit" not in e), key=_place_of):
        if "introduced" in event and _place_of(event) <= (True, version):
            inside = True
        if "fixed" in event and version >= Version(str(event["fixed"])):
            inside = False
        if "last_affected" in event and version > Version(str(event["last_affected"])):
            inside = False
    return inside


def _place_of(event: Mapping[str, Any]) -> tuple[bool, Version]:
    """What events are in order by: "0" is before all versions, such as 0.dev1."""
    text = str(next(iter(event.values()), "none"))
    return not ("introduced" in event and text == "0"), Version(text)


def _from_pip_audit(queried: Mapping[str, str]) -> ScanResult:
    source = "pip-audit"
    with tempfile.TemporaryDirectory() as directory:
        listing = Path(directory) / "releases.txt"
        lines = [f"{name}=={version.split('+')[0]}" for name, version in queried.items()]
        reports = [
            _audit(listing, lines),
            # Apart, because one file cannot name a distribution in two versions.
            _audit(listing, [f"{CANARY[0]}=={CANARY[1]}"]),
        ]
    hits: list[tuple[str, str, str]] = []
    skipped: list[str] = []
    for report in reports:
        if isinstance(report, str):
            return _not_scanned(source, report)
        for entry in report.get("dependencies", []):
            if "skip_reason" in entry:
                skipped.append(f"{entry.get('name')}: {entry['skip_reason']}")
            for advisory in entry.get("vulns", []):
                name = canonicalize_name(entry["name"])
                hits.append((name, entry["version"], advisory["id"]))
    result = _verdict(source, queried, hits)
    # What it could not look up is never clean, and hides nothing of the rest.
    return _not_scanned(source, skipped[0]) if skipped and result.state == "clean" else result


def _audit(listing: Path, lines: list[str]) -> dict[str, Any] | str:
    listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Not --strict, which gives no report at all when one of them cannot be looked up.
    # -P: a file of the working directory (types.py) would be imported for the library's.
    command = [sys.executable, "-P", "-m", "pip_audit", "--no-deps", "--disable-pip"]
    try:
        done = subprocess.run(
            [*command, "--format", "json", "-r", str(listing)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        report: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return f"pip-audit did not answer within {_TIMEOUT_S} s"
    except ValueError:
        return f"pip-audit gave no report: {done.stderr.strip().splitlines()[-1:]}"
    return report
