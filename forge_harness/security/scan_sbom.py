"""A bill of materials: the installed distributions as CycloneDX 1.6 JSON.

Schema: https://cyclonedx.org/docs/1.6/json/. Package URLs: ECMA-427 (`pkg:pypi/name@version`).
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from forge_harness.probes import distributions
from forge_harness.security.scan_types import Scan, judged

NAME = "bill of materials"
SPEC_VERSION = "1.6"
ROOT = distributions.DISTRIBUTION


def build(search: Sequence[str] | None = None, moment: datetime | None = None) -> dict[str, Any]:
    """Returns the bill of materials of an environment.

    Args:
        search: Directories of installed distributions; `sys.path` when None.
        moment: When it is made; now when None.
    """
    found = installed(search)
    names = frozenset(found)
    components = [_component(name, about) for name, about in found.items() if name != ROOT]
    dependencies = [
        {"ref": _purl(name, distributions.version_in(about)), "dependsOn": _needs(about, found)}
        for name, about in found.items()
    ]
    version = distributions.installed_version(ROOT) or "0"
    made = (moment or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
    about_root = _root(found.get(ROOT))
    if ROOT not in names:
        dependencies.insert(0, {"ref": about_root["bom-ref"], "dependsOn": []})
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": made,
            "tools": {
                "components": [{"type": "application", "name": "forge-harness", "version": version}]
            },
            "component": about_root,
        },
        "components": components,
        "dependencies": dependencies,
    }


def scan(bill: dict[str, Any], search: Sequence[str] | None = None) -> Scan:
    """Holds a bill against another count of what is installed: the directories of metadata.

    Args:
        bill: As `build` returns it.
        search: Directories of installed distributions; `sys.path` when None.
    """
    listed = {canonicalize_name(entry["name"]) for entry in bill["components"]}
    listed.add(canonicalize_name(bill["metadata"]["component"]["name"]))
    counted = _metadata_directories(search)
    return judged(
        NAME,
        "forge-harness",
        f"CycloneDX {bill['specVersion']}",
        len(bill["components"]),
        (),
        canary=f"{len(counted)} directories of metadata, counted without importlib",
        missed=counted - listed,
    )


def installed(search: Sequence[str] | None = None) -> dict[str, metadata.Distribution]:
    """Returns canonical name -> distribution, the first on the path, as an import finds it."""
    found: dict[str, metadata.Distribution] = {}
    for about in metadata.distributions(path=list(sys.path if search is None else search)):
        if name := distributions.fields_of(about)["Name"]:
            found.setdefault(canonicalize_name(name), about)
    return dict(sorted(found.items()))


def _metadata_directories(search: Sequence[str] | None) -> set[str]:
    counted: set[str] = set()
    for entry in sys.path if search is None else search:
        for path in Path(entry or ".").glob("*.dist-info"):
            if (path / "METADATA").is_file():
                counted.add(canonicalize_name(path.name.removesuffix(".dist-info").rsplit("-")[0]))
    return counted


def _component(name: str, about: metadata.Distribution) -> dict[str, Any]:
    version = distributions.version_in(about)
    purl = _purl(name, version)
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": distributions.fields_of(about)["Name"],
        "version": version,
        "purl": purl,
    }
    text = _license(about)
    if text is not None:
        component["licenses"] = [text]
    return component


def _license(about: metadata.Distribution) -> dict[str, Any] | None:
    fields = distributions.fields_of(about)
    if "License-Expression" in fields:
        return {"expression": fields["License-Expression"]}
    text = distributions.license_in(fields)
    return None if text == "unknown" else {"license": {"name": text}}


def _root(about: metadata.Distribution | None) -> dict[str, Any]:
    version = "0" if about is None else distributions.version_in(about)
    purl = _purl(ROOT, version)
    return {
        "type": "application",
        "bom-ref": purl,
        "name": ROOT,
        "version": version,
        "purl": purl,
    }


def _needs(about: metadata.Distribution, found: dict[str, metadata.Distribution]) -> list[str]:
    """Returns what a distribution needs here without an extra, among what is installed."""
    names = set()
    for text in distributions.declared_in(about):
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            names.add(canonicalize_name(requirement.name))
    needed = sorted(names & set(found))
    return [_purl(name, distributions.version_in(found[name])) for name in needed]


def _purl(name: str, version: str) -> str:
    return f"pkg:pypi/{canonicalize_name(name)}@{quote(version, safe='.-_~')}"
