"""The scan for advisories: what it finds, and what it must not call clean."""

import json
import zipfile
from datetime import UTC, datetime, timedelta

import pytest

from forge_harness.probes import advisories, distributions

CANARY_ADVISORY = {
    "id": "PYSEC-2014-8",
    "modified": datetime.now(UTC).isoformat(),
    "affected": [
        {
            "package": {"ecosystem": "PyPI", "name": "Jinja2"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.7.2"}]}],
        }
    ],
}


def advisory_file(tmp_path, monkeypatch, records):
    path = tmp_path / "osv.json"
    path.write_text(json.dumps(records) if isinstance(records, list) else records)
    monkeypatch.setenv(advisories.FILE_VARIABLE, str(path))


V = "2.13.0"


def affecting(name, **versions):
    return {
        "id": "TEST-1",
        "affected": [{"package": {"ecosystem": "PyPI", "name": name}, **versions}],
    }


def test_a_live_scan_without_findings_is_clean(run_check, monkeypatch, tmp_path):
    advisory_file(tmp_path, monkeypatch, [CANARY_ADVISORY])
    run = run_check("dependencies.known_vulnerabilities")
    assert run.outcome == "pass", run.reason
    assert run.evidence("scanned") > 10
    assert 0 <= run.evidence("advisory_age") < 1


def test_an_empty_closure_was_not_scanned(run_check, monkeypatch, tmp_path):
    advisory_file(tmp_path, monkeypatch, [CANARY_ADVISORY])
    monkeypatch.setattr(distributions, "dependency_closure", lambda: [])
    run = run_check("dependencies.known_vulnerabilities")
    assert run.outcome == "fail"
    assert "scanned is 0 distributions, under" in run.reason


def test_advisories_of_last_year_are_not_live(run_check, monkeypatch, tmp_path):
    old = (datetime.now(UTC) - timedelta(days=400)).isoformat()
    advisory_file(tmp_path, monkeypatch, [{**CANARY_ADVISORY, "modified": old}])
    run = run_check("dependencies.known_vulnerabilities")
    assert run.outcome == "not_measured"
    assert "newest advisory is 400 days old" in run.reason


def scan_records(tmp_path, records, installed):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    return advisories.scan(installed, {advisories.FILE_VARIABLE: str(path)})


def test_withdrawn_advisories_do_not_count(tmp_path):
    withdrawn = {**affecting("demo", versions=["1"]), "withdrawn": "2020-01-01T00:00:00Z"}
    assert scan_records(tmp_path, [CANARY_ADVISORY, withdrawn], {"demo": "1"}).state == "clean"


def test_advisories_of_other_ecosystems_do_not_count(tmp_path):
    other = affecting("demo", versions=["1"])
    other["affected"][0]["package"]["ecosystem"] = "npm"
    assert scan_records(tmp_path, [CANARY_ADVISORY, other], {"demo": "1"}).state == "clean"


def test_an_archive_as_osv_publishes_it_is_read(tmp_path):
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("PYSEC-2014-8.json", json.dumps(CANARY_ADVISORY))
        archive.writestr("TEST-1.json", json.dumps(affecting("demo", versions=["1"])))
    result = advisories.scan({"demo": "1"}, {advisories.FILE_VARIABLE: str(path)})
    assert (result.state, result.findings) == ("found", ("demo 1: TEST-1",))


ANSWERS = {
    # What pip-audit 2.10 does; the last three exit without a report, or with one of nothing.
    "clean": "report(entry('demo', '1'))",
    "found": "report(entry('demo', '1', 'GHSA-1'))",
    "unreachable": "sys.stderr.write('ConnectionError: api.osv.dev\\n'); sys.exit(1)",
    "nothing": "print(json.dumps({'dependencies': [], 'fixes': []})); sys.exit(0)",
    "skipped": "report({'name': 'demo', 'skip_reason': 'not found on PyPI'})",
    "skipped and found": (
        "report({'name': 'own', 'skip_reason': 'not found on PyPI'}, entry('demo', '1', 'GHSA-1'))"
    ),
}
PIP_AUDIT = """
import json, pathlib, sys
assert "--strict" not in sys.argv  # it would give no report for one that is skipped
listed = pathlib.Path(sys.argv[-1]).read_text().split()
def entry(name, version, *ids):
    return {{"name": name, "version": version, "vulns": [{{"id": i}} for i in ids]}}
def report(*entries):
    print(json.dumps({{"dependencies": list(entries), "fixes": []}}))
    sys.exit(any(e.get("vulns") for e in entries))
if listed == ["jinja2==2.4.1"] and {live}:
    report(entry("Jinja2", "2.4.1", "PYSEC-2014-8"))
assert "demo==1" in listed or listed == ["jinja2==2.4.1"], listed
{answer}
"""


@pytest.mark.parametrize(
    ("answer", "state", "said"),
    [
        ("clean", "clean", ""),
        ("found", "found", "demo 1: GHSA-1"),
        ("unreachable", "not scanned", "ConnectionError"),
        ("nothing", "not scanned", "did not find its canary"),
        ("skipped", "not scanned", "not found on PyPI"),
        ("skipped and found", "found", "demo 1: GHSA-1"),
    ],
)
def test_pip_audit(tmp_path, monkeypatch, answer, state, said):
    # "nothing" is the trap: exit 0, no vulnerability, for the canary as well.
    live = answer not in ("unreachable", "nothing")
    (tmp_path / "pip_audit.py").write_text(PIP_AUDIT.format(answer=ANSWERS[answer], live=live))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("forge_harness.probes.advisories.util.find_spec", lambda name: object())
    result = advisories.scan({"demo": "1+cpu"}, {})
    assert result.state == state, result
    assert said in " ".join((*result.findings, result.why_not))


@pytest.mark.parametrize("records", [[], [affecting("pytest", versions=["0.1"])], "not json"])
def test_a_scan_that_misses_its_canary_is_no_scan(run_check, monkeypatch, tmp_path, records):
    advisory_file(tmp_path, monkeypatch, records)
    run = run_check("dependencies.known_vulnerabilities")
    assert run.outcome == "not_measured"
    assert "not scanned" in run.reason


def test_no_advisory_data_is_not_measured(run_check, monkeypatch):
    monkeypatch.delenv(advisories.FILE_VARIABLE, raising=False)
    monkeypatch.setattr("forge_harness.probes.advisories.util.find_spec", lambda name: None)
    run = run_check("dependencies.known_vulnerabilities")
    assert run.outcome == "not_measured"
    assert "no advisory data" in run.reason


def test_a_vulnerable_release_is_found(run_check, monkeypatch, tmp_path):
    version = distributions.installed_version("click")
    advisory_file(tmp_path, monkeypatch, [CANARY_ADVISORY, affecting("Click", versions=[version])])
    run = run_check("dependencies.known_vulnerabilities")
    assert run.outcome == "fail"
    assert f"click {version}: TEST-1" in run.reason


@pytest.mark.parametrize(
    ("events", "version", "affected"),
    [
        ([{"introduced": "0"}, {"fixed": "2.0"}], "1.9", True),
        ([{"introduced": "0"}, {"fixed": "2.0"}], "2.0", False),
        ([{"introduced": "1.5"}, {"fixed": "2.0"}], "1.4", False),
        ([{"introduced": "0"}, {"last_affected": "1.9"}], "1.9", True),
        ([{"introduced": "0"}, {"last_affected": "1.9"}], "1.9.1", False),
        ([{"introduced": "0"}, {"fixed": "1"}, {"introduced": "2"}, {"fixed": "3"}], "2.5", True),
        ([{"introduced": "0"}, {"fixed": "1"}, {"introduced": "2"}, {"fixed": "3"}], "1.5", False),
    ],
)
def test_osv_ranges(tmp_path, events, version, affected):
    record = affecting("demo", ranges=[{"type": "ECOSYSTEM", "events": events}])
    path = tmp_path / "osv.json"
    path.write_text(json.dumps([CANARY_ADVISORY, record]))
    result = advisories.scan({"demo": version}, {advisories.FILE_VARIABLE: str(path)})
    assert result.state == ("found" if affected else "clean")


def test_an_unknown_version_is_never_clean(tmp_path):
    """It was left out: its advisories were not looked at."""
    records = [CANARY_ADVISORY, affecting("b", versions=["1.0"])]
    assert scan_records(tmp_path, records, {"b": "unknown"}).state == "not scanned"


@pytest.mark.parametrize(
    "covered",
    [
        {"versions": ["2.13.0"]},
        {"versions": ["of old", "2.13"]},
        {"ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"last_affected": V}]}]},
    ],
)
def test_a_build_of_a_release_is_that_release(tmp_path, covered):
    """PyTorch's wheels for processors, 2.13.0+cpu, came out clean of what is wrong with 2.13.0."""
    record = affecting("torch", **covered)
    result = scan_records(tmp_path, [CANARY_ADVISORY, record], {"torch": f"{V}+cpu"})
    assert result.findings == ("torch 2.13.0+cpu: TEST-1",)


def test_a_version_that_cannot_be_compared_is_never_clean(tmp_path):
    span = {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}
    records = [CANARY_ADVISORY, affecting("demo", ranges=[span]), affecting("other", versions=[V])]
    result = scan_records(tmp_path, records, {"demo": "1.0-of-ours"})
    assert result.state == "not scanned"
    assert "demo 1.0-of-ours cannot be compared with TEST-1" in result.why_not
    result = scan_records(tmp_path, records, {"demo": "1.0-of-ours", "other": V})
    assert result.findings == ("other 2.13.0: TEST-1",)


@pytest.mark.parametrize(
    "affected",
    [
        "demo",
        ["demo"],
        [{"package": {"ecosystem": "PyPI", "name": 5}}],
        [
            {
                "package": {"ecosystem": "PyPI", "name": "demo"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{}]}],
            }
        ],
    ],
)
def test_a_record_of_another_form_is_never_clean(tmp_path, affected):
    records = [CANARY_ADVISORY, {"id": "TEST-2", "affected": affected}]
    result = scan_records(tmp_path, records, {"demo": "1.0"})
    assert result.state == "not scanned"
    assert "TEST-2" in result.why_not


def test_what_a_record_leaves_empty_says_nothing(tmp_path):
    covering = {**affecting("demo", versions=["1.0"], ranges=None), "withdrawn": None}
    empty = [{"id": "A", "affected": None}, affecting("demo", versions=None)]
    result = scan_records(tmp_path, [CANARY_ADVISORY, *empty, covering], {"demo": "1.0"})
    assert result.findings == ("demo 1.0: TEST-1",)
    assert scan_records(tmp_path, [CANARY_ADVISORY, *empty], {"demo": "1.0"}).state == "clean"


def test_an_advisory_of_the_future_makes_no_old_file_live(tmp_path):
    old = {**CANARY_ADVISORY, "modified": "2020-01-01T00:00:00Z"}
    late = {"id": "TEST-3", "modified": "2999-01-01T00:00:00Z"}
    result = scan_records(tmp_path, [old, late], {"demo": "1.0"})
    assert result.state == "not scanned"
    assert "days in the future" in result.why_not


def test_events_may_come_in_any_order(tmp_path):
    span = {"type": "ECOSYSTEM", "events": [{"fixed": "2.0"}, {"introduced": "0"}]}
    record = affecting("demo", ranges=[span])
    assert scan_records(tmp_path, [CANARY_ADVISORY, record], {"demo": "2.1"}).state == "clean"
    assert scan_records(tmp_path, [CANARY_ADVISORY, record], {"demo": "1.9"}).state == "found"
