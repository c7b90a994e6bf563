"""Scans of what is installed: published advisories, and licenses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from forge_harness.errors import several
from forge_harness.probes import advisories, distributions, licenses
from forge_harness.security import scan_sbom
from forge_harness.security.scan_types import Finding, Scan, judged, not_scanned

ADVISORIES = "advisories"
LICENSES = "licenses"
_LICENSE_CANARY = {"AGPL-3.0-only": "refused", "no word of a license": "unclear", "MIT": "allowed"}


def scan_advisories(
    installed: Mapping[str, str] | None = None, database: Path | None = None
) -> Scan:
    """Looks distributions up in an advisory database, or asks pip-audit.

    Args:
        installed: Distribution name -> version; all that are installed when None, but for what
            pip-audit cannot know: projects that were installed from a directory or repository.
        database: OSV file, archive or directory (see `probes.advisories.scan`).
    """
    left_out: list[str] = []
    if installed is None:
        here = scan_sbom.installed()
        if not (database or os.environ.get(advisories.FILE_VARIABLE)):
            left_out = [name for name, about in here.items() if _is_of_no_index(about)]
        known: Mapping[str, str] = {
            name: distributions.version_in(about)
            for name, about in here.items()
            if name not in left_out
        }
    else:
        known = installed
    found = advisories.scan(known, database=database)
    if found.state == "not scanned":
        return not_scanned(ADVISORIES, found.source, found.why_not, age=found.age_days)
    age = found.age_days
    return judged(
        ADVISORIES,
        found.source,
        "live" if age is None else f"snapshot {age:.0f} days old",
        found.scanned,
        (_advisory(text) for text in found.findings),
        canary=" ".join(advisories.CANARY),
        missed=(),  # A scan that misses its canary says not scanned itself.
        notes=tuple(_not_asked_for(left_out)),
        age=age,
    )


def _is_of_no_index(about: metadata.Distribution) -> bool:
    """Whether a distribution was installed from sources, of which pip keeps a note (PEP 610)."""
    if distributions.fields_of(about)["Name"] == distributions.DISTRIBUTION:
        return True
    try:
        origin = json.loads(about.read_text("direct_url.json") or "{}")
    except ValueError:
        return False
    return isinstance(origin, dict) and not origin.keys().isdisjoint({"dir_info", "vcs_info"})


def _not_asked_for(names: list[str]) -> Iterator[str]:
    if names:
        count = several(len(names), "distribution")
        yield f"{count} installed from sources not asked for: {', '.join(names)}"


def _advisory(text: str) -> Finding:
    release, _, advisory = text.partition(": ")
    return Finding(release, 0, advisory, "has a published vulnerability")


def scan_licenses(texts: Mapping[str, str] | None = None) -> Scan:
    """Judges the licenses distributions state; what nobody can read is a finding too.

    Args:
        texts: Distribution name -> license text; this package's closure when None.
    """
    stated = (
        {name: distributions.license_of(name) for name in distributions.dependency_closure()}
        if texts is None
        else texts
    )
    verdicts = {name: licenses.judge(text) for name, text in stated.items()}
    return judged(
        LICENSES,
        "forge-harness",
        f"{len(licenses.ALLOWED_WORDS)} allowed, {len(licenses.REFUSED_WORDS)} refused words",
        len(stated),
        (
            Finding(name, 0, verdict, f"its license is {stated[name]!r}")
            for name, verdict in verdicts.items()
            if verdict != "allowed"
        ),
        canary=f"{len(_LICENSE_CANARY)} texts of known meaning",
        missed=(t for t, expected in _LICENSE_CANARY.items() if licenses.judge(t) != expected),
    )
