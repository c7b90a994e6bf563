"""Advisory databases as directories, and what an answer without data is worth."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from forge_harness.probes import advisories, distributions
from forge_harness.security import scan_installed

NOW = datetime.now(UTC)
# The layout and the key order of pypa/advisory-database, a file a record.
YAML = """\
id: {id}
details: 'A record made for a test, with "name: other" in its text.'
affected:
- package:
    name: {name}
    ecosystem: PyPI
    purl: pkg:pypi/{name}
  ranges:
  - type: ECOSYSTEM
    events:
    - introduced: "0"
    - fixed: {fixed}
  versions:
  - "1.9"
modified: "{modified}"
"""

# Finds the canary and nothing else, and notes what it was given.
PIP_AUDIT = """
import json, pathlib, sys
releases = pathlib.Path(sys.argv[-1]).read_text()
with open({asked!r}, "a") as asked:
    asked.write(releases)
canary = {{"name": "jinja2", "version": "2.4.1", "vulns": [{{"id": "PYSEC-2014-8"}}]}}
print(json.dumps({{"dependencies": [canary] if "jinja2==2.4.1" in releases else []}}))
"""


@pytest.fixture
def database(tmp_path):
    """Writes a record of a distribution; the canary's is there from the start."""
    root = tmp_path / "advisory-database"

    def add(name, advisory, fixed, age_days=1.0, suffix="yaml"):
        moment = (NOW - timedelta(days=age_days)).strftime("%Y-%m-%dT%H:%M:%S.000000Z")
        file = root / "vulns" / name / f"{advisory}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(YAML.format(id=advisory, name=name, fixed=fixed, modified=moment))
        return file

    add("jinja2", "PYSEC-2014-8", "2.7.2")
    add.root = root
    return add


def test_a_directory_without_a_matching_record_is_clean(database):
    database("demo", "PYSEC-1", "2.0")
    scan = scan_installed.scan_advisories({"demo": "2.0", "other": "1"}, database.root)
    assert (scan.state, scan.scanned, scan.canary) == ("clean", 2, "jinja2 2.4.1")
    assert 0.9 < scan.data_age_days < 1.1


@pytest.mark.parametrize("version", ["1.9", "1.9.post1", "0", "0.dev1", "0a1"])
def test_a_vulnerable_release_is_found(database, version):
    database("demo", "PYSEC-1", "2.0")
    scan = scan_installed.scan_advisories({"Demo": version}, database.root)
    assert scan.state == "found"
    assert [f.sentence() for f in scan.findings] == [
        f"demo {version}: PYSEC-1: has a published vulnerability"
    ]


def test_records_as_json_are_read(database):
    record = {
        "id": "GHSA-1",
        "modified": NOW.isoformat(),
        "affected": [{"package": {"ecosystem": "PyPI", "name": "demo"}, "versions": ["1"]}],
    }
    (database.root / "GHSA-1.json").write_text(json.dumps(record, indent=2))
    scan = scan_installed.scan_advisories({"demo": "1"}, database.root)
    assert [finding.rule for finding in scan.findings] == ["GHSA-1"]


def of_range(*events, kind="ECOSYSTEM"):
    span = {"type": kind, "events": [dict([event]) for event in events]}
    return [{"package": {"ecosystem": "PyPI", "name": "demo"}, "ranges": [span]}]


@pytest.mark.parametrize(
    ("affected", "state"),
    [
        (of_range(("introduced", "0"), ("limit", "2")), "clean"),
        (of_range(("introduced", "0"), ("limit", "4")), "found"),
        (of_range(("introduced", "0"), ("limit", "*")), "found"),
        (
            of_range(("fixed", "5"), ("introduced", "3"), ("fixed", "2"), ("introduced", "1")),
            "found",
        ),
        # Nobody has compared the release with these.
        (of_range(("introduced", "0"), kind="GIT"), "not scanned"),
        (of_range(("introduced", "0"), ("fixed", "9.0.0"), kind="SEMVER"), "not scanned"),
        (5, "not scanned"),
    ],
)
def test_what_a_record_says_of_releases(database, affected, state):
    record = {"id": "X", "modified": NOW.isoformat(), "name": "demo", "affected": affected}
    (database.root / "a.json").write_text(json.dumps(record))
    scan = scan_installed.scan_advisories({"demo": "3"}, database.root)
    assert scan.state == state, scan


def test_who_has_the_canary_installed_is_told(database):
    scan = scan_installed.scan_advisories({"jinja2": "2.4.1"}, database.root)
    assert [(f.place, f.rule) for f in scan.findings] == [("jinja2 2.4.1", "PYSEC-2014-8")]


def test_a_withdrawn_record_does_not_count(database):
    file = database("demo", "PYSEC-1", "2.0")
    file.write_text(file.read_text() + 'withdrawn: "2024-01-01T00:00:00Z"\n')
    assert scan_installed.scan_advisories({"demo": "1"}, database.root).state == "clean"


def test_the_age_is_that_of_the_newest_record_of_all(database, tmp_path):
    database("jinja2", "PYSEC-2014-8", "2.7.2", age_days=800)
    scan = scan_installed.scan_advisories({"demo": "1"}, database.root)
    assert scan.state == "not scanned"
    assert "800 days old, live data are at most 30" in scan.why_not
    database("unrelated", "PYSEC-2", "1.0", age_days=3)
    scan = scan_installed.scan_advisories({"demo": "1"}, database.root)
    assert (scan.state, round(scan.data_age_days)) == ("clean", 3)


def no_canary(root):
    (root / "vulns" / "jinja2" / "PYSEC-2014-8.yaml").unlink()
    (root / "a.json").write_text(json.dumps({"id": "X", "modified": NOW.isoformat()}))
    return "did not find its canary"


def empty(root):
    (root / "vulns" / "jinja2" / "PYSEC-2014-8.yaml").unlink()
    return "holds no advisory"


def not_yaml(root):
    (root / "vulns" / "jinja2" / "PYSEC-2014-8.yaml").write_text("name: jinja2\n- : [")
    return "is not YAML"


def a_list(root):
    (root / "vulns" / "jinja2" / "PYSEC-2014-8.yaml").write_text("- name: jinja2\n")
    return "holds list, expected one OSV record"


def too_deep(root):
    (root / "a.json").write_text('{"name": "demo", "x": ' + "[" * 100_000)
    return "nested too deeply"


@pytest.mark.parametrize("damage", [no_canary, empty, not_yaml, a_list, too_deep])
def test_a_damaged_database_is_no_scan(database, damage):
    said = damage(database.root)
    scan = scan_installed.scan_advisories({"demo": "1"}, database.root)
    assert scan.state == "not scanned"
    assert said in scan.why_not


def test_links_are_not_followed(database, tmp_path):
    outside = tmp_path / "outside.yaml"
    outside.write_text(database("demo", "PYSEC-1", "2.0").read_text())
    (database.root / "vulns" / "demo" / "PYSEC-1.yaml").unlink()
    (database.root / "link.yaml").symlink_to(outside)
    assert scan_installed.scan_advisories({"demo": "1"}, database.root).state == "clean"


def test_no_data_at_all_is_no_scan(monkeypatch):
    monkeypatch.delenv(advisories.FILE_VARIABLE, raising=False)
    monkeypatch.setattr("forge_harness.probes.advisories.util.find_spec", lambda name: None)
    scan = scan_installed.scan_advisories({"demo": "1"})
    assert (scan.state, scan.scanned) == ("not scanned", 0)


@pytest.fixture(params=["dir_info", "vcs_info"])
def of_sources(request, tmp_path, monkeypatch):
    """A project of the user's beside all that is installed, as `pip install -e .` leaves it."""
    about = tmp_path / "site" / "my_project-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-project\nVersion: 1.0\n")
    told = {request.param: {}, "url": "file:///src"}
    (about / "direct_url.json").write_text(json.dumps(told))
    monkeypatch.syspath_prepend(str(about.parent))


def test_all_that_is_installed_is_looked_up(database, of_sources):
    """Not only what this package needs: the environment is that of the user's project."""
    assert "my-project" not in distributions.dependency_closure()
    database("my-project", "PYSEC-1", "2.0")
    scan = scan_installed.scan_advisories(database=database.root)
    assert [(f.place, f.rule) for f in scan.findings] == [("my-project 1.0", "PYSEC-1")]
    assert scan.scanned > len(distributions.dependency_closure())


def test_pip_audit_is_not_asked_for_what_no_index_has(tmp_path, of_sources, monkeypatch):
    monkeypatch.delenv(advisories.FILE_VARIABLE, raising=False)
    asked = tmp_path / "asked.txt"
    (tmp_path / "site" / "pip_audit.py").write_text(PIP_AUDIT.format(asked=str(asked)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    scan = scan_installed.scan_advisories()
    assert scan.state == "clean", scan.why_not
    assert "my-project" in scan.notes[0]
    assert "my-project" not in asked.read_text()
    assert "numpy==" in asked.read_text()


def test_the_variable_may_name_a_directory(database, monkeypatch):
    monkeypatch.setenv(advisories.FILE_VARIABLE, str(database.root))
    database("demo", "PYSEC-1", "2.0")
    assert scan_installed.scan_advisories({"demo": "1"}).state == "found"


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("MIT", "clean"),
        ("ZPL-2.1", "clean"),
        ("AGPL-3.0-only", "found"),
        ("nobody knows", "found"),
        ("GPL OR MIT", "clean"),
        ("GPLv3 or (at your option) any later version", "found"),
        ("GPL v2 or any newer version", "found"),
        ("GPL-3.0-only OR LicenseRef-of-ours", "found"),
        ("BSD 3-Clause New or Revised License", "clean"),
    ],
)
def test_licenses(text, state):
    assert scan_installed.scan_licenses({"demo": text}).state == state


def test_licenses_of_nothing_are_not_scanned():
    assert scan_installed.scan_licenses({}).state == "not scanned"


def test_a_license_reader_that_refuses_nothing_is_no_scan(monkeypatch):
    monkeypatch.setattr("forge_harness.probes.licenses.REFUSED_WORDS", frozenset())
    scan = scan_installed.scan_licenses({"demo": "MIT"})
    assert scan.state == "not scanned"
    assert "AGPL" in scan.why_not
