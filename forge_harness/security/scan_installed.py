"""Scans of what is installed: published advisories, and licenses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forge_harness.probes import advisories, distributions, licenses
from forge_harness.security.scan_types import Finding, Scan, judged, not_scanned

ADVISORIES = "advisories"
LICENSES = "licenses"
_LICENSE_CANARY = {"AGPL-3.0-only": "refused", "no word of a license": "unclear", "MIT": "allowed"}


def closure() -> dict[str, str]:
    """Returns name -> version of every distribution this package needs, directly or not."""
    names = distributions.dependency_closure()
    return {
        name: distributions.installed_version(name) or distributions.NO_VERSION for name in names
    }


def scan_advisories(
    installed: Mapping[str, str] | None = None, database: Path | None = None
) -> Scan:
    """Looks distributions up in an advisory database, or asks pip-audit.

    Args:
        installed: Distribution name -> version; this package's closure when None.
        database: OSV file, archive or directory (see `probes.advisories.scan`).
    """
    known = closure() if installed is None else installed
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
        age=age,
    )


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
