"""The bill of materials against the published schema and an independent count."""

import json
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from jsonschema import Draft7Validator, FormatChecker

from forge_harness.security import scan_sbom


def published_schema():
    """CycloneDX 1.6 as its own package ships it, with the schemas it refers to."""
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT7

    spec = find_spec("cyclonedx")
    if spec is None:
        pytest.skip("cyclonedx-python-lib, which ships the schema, is not installed")
    folder = Path(spec.origin).parent / "schema" / "_res"
    schema = json.loads((folder / "bom-1.6.SNAPSHOT.schema.json").read_text())
    others = [
        json.loads(p.read_text()) for p in folder.glob("*.schema.json") if "bom-" not in p.name
    ]
    base = schema["$id"].rpartition("/")[0]
    registry = Registry().with_resources(
        (other.get("$id") or f"{base}/{name}", Resource(other, DRAFT7))
        for name, other in zip(map(str, range(99)), others, strict=False)
    )
    return Draft7Validator(schema, registry=registry, format_checker=FormatChecker())


@pytest.fixture(scope="module")
def bill():
    return scan_sbom.build()


def test_it_fits_the_published_schema(bill):
    validator = published_schema()
    problems = [e.message for e in validator.iter_errors(json.loads(json.dumps(bill)))]
    assert problems == []
    broken = {**bill, "components": [{**bill["components"][0], "type": "no such type"}]}
    assert list(validator.iter_errors(broken))


def test_it_lists_what_pip_lists(bill):
    listed = {
        re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version
        for d in reversed(list(metadata.distributions()))
    }
    found = {
        re.sub(r"[-_.]+", "-", c["name"]).lower(): c["version"]
        for c in [*bill["components"], bill["metadata"]["component"]]
    }
    assert found == listed
    assert len(found) > 50


def test_references_are_unique_and_lead_somewhere(bill):
    references = [c["bom-ref"] for c in [*bill["components"], bill["metadata"]["component"]]]
    assert len(set(references)) == len(references)
    assert {d["ref"] for d in bill["dependencies"]} == set(references)
    assert {n for d in bill["dependencies"] for n in d["dependsOn"]} <= set(references)
    own = next(d for d in bill["dependencies"] if "bitnet-forge-harness" in d["ref"])
    assert any(need.startswith("pkg:pypi/torch@") for need in own["dependsOn"])


def test_a_local_version_is_quoted():
    assert scan_sbom._purl("Torch", "2.13.0+cpu") == "pkg:pypi/torch@2.13.0%2Bcpu"


def install(directory, name, version):
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_the_scan_counts_again(tmp_path):
    install(tmp_path, "one", "1.0")
    install(tmp_path, "two", "2.0")
    bill = scan_sbom.build([str(tmp_path)])
    assert scan_sbom.scan(bill, [str(tmp_path)]).state == "clean"
    short = {**bill, "components": bill["components"][:1]}
    scan = scan_sbom.scan(short, [str(tmp_path)])
    assert (scan.state, "two" in scan.why_not) == ("not scanned", True)


def test_metadata_in_another_encoding_or_without_a_version_are_listed(tmp_path):
    """Either, anywhere on the path, was a traceback in place of the bill."""
    for name, fields in (("old", b"Version: 1\nAuthor: Andr\xe9\n"), ("bare", b"")):
        (tmp_path / f"{name}-1.dist-info").mkdir()
        about = b"Metadata-Version: 2.1\nName: " + name.encode() + b"\n" + fields
        (tmp_path / f"{name}-1.dist-info" / "METADATA").write_bytes(about)
    bill = scan_sbom.build([str(tmp_path)])
    assert {entry["name"]: entry["version"] for entry in bill["components"]} == {
        "old": "1",
        "bare": "unknown",
    }


def test_the_first_on_the_path_is_the_one_imported(tmp_path):
    for folder, version in (("a", "1.0"), ("b", "2.0")):
        (tmp_path / folder).mkdir()
        install(tmp_path / folder, "one", version)
    bill = scan_sbom.build([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [c["version"] for c in bill["components"]] == ["1.0"]


def test_the_scan_of_this_environment_is_clean(bill):
    scan = scan_sbom.scan(bill)
    assert scan.state == "clean", scan.why_not
    assert scan.scanned == len(bill["components"])
    assert sys.path
