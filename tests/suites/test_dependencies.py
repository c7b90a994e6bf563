"""Each dependencies check goes red for its own reason."""

import json
import re
import zipfile
from datetime import UTC, datetime, timedelta
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from forge_harness import kernels, paths
from forge_harness.environment import collect_environment
from forge_harness.probes import advisories, distributions, licenses, startup

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


@pytest.mark.parametrize(
    "name", ["requirements_satisfied", "native_extension", "torch_build", "import_budget"]
)
def test_this_installation_is_sound(run_check, name):
    run = run_check(f"dependencies.{name}")
    assert run.outcome == "pass", run.reason


def test_a_vendors_build_of_torch_is_known_by_its_normalised_version(run_check, monkeypatch):
    """NVIDIA's containers: the module says nv25.01, its metadata, as PEP 440 has it, nv25.1."""
    true = distributions.installed_version
    monkeypatch.setattr("torch.__version__", "2.6.0a0+ecf3bae40a.nv25.01")
    monkeypatch.setattr(
        distributions,
        "installed_version",
        lambda name: "2.6.0a0+ecf3bae40a.nv25.1" if name == "torch" else true(name),
    )
    run = run_check("dependencies.torch_build")
    assert run.outcome == "pass", run.reason


@pytest.mark.parametrize(
    ("installed", "outcome"), [("2.13.0", "pass"), ("2.13.0+cpu", "fail"), ("2.12.1", "fail")]
)
def test_a_build_from_pypi_has_its_local_part_in_the_module_only(
    run_check, monkeypatch, installed, outcome
):
    true = distributions.installed_version
    monkeypatch.setattr("torch.__version__", "2.13.0+cu130")
    monkeypatch.setattr(
        distributions,
        "installed_version",
        lambda name: installed if name == "torch" else true(name),
    )
    run = run_check("dependencies.torch_build")
    assert run.outcome == outcome, run.reason


@pytest.mark.parametrize("name", ["licenses", "lock_matches"])
def test_this_installation_does_not_fail(run_check, name):
    assert run_check(f"dependencies.{name}").outcome in {"pass", "warn", "not_measured"}


def too_old_requirement(patch):
    patch.setattr(distributions, "requirements", lambda: [Requirement("pytest>=999")])


def missing_requirement(patch):
    patch.setattr(distributions, "requirements", lambda: [Requirement("not-on-this-machine")])


def no_requirement(patch):
    patch.setattr(distributions, "requirements", lambda: [])


def other_pin(patch):
    patch.setattr(distributions, "committed_pins", lambda path: [Requirement("pytest==1.0")])


def stale_native_build(patch):
    patch.setattr(kernels, "native_version", lambda: "0.0.1")


def extension_of_another_interpreter(patch):
    patch.setattr("importlib.machinery.EXTENSION_SUFFIXES", [".cpython-39-x86_64-linux-gnu.so"])


def nothing_installed(patch):
    patch.setattr(distributions, "requirements", lambda: [Requirement("not-on-this-machine")])
    patch.setattr(distributions, "DISTRIBUTION", "not-installed-either")


def no_native_build(patch):
    patch.setattr(kernels, "native_problem", lambda: "No module named 'forge_kernels._native'")


def shadowed_torch(patch):
    true = distributions.installed_version
    patch.setattr(
        distributions, "installed_version", lambda name: "1.0" if name == "torch" else true(name)
    )


def cuda_build_without_driver(patch):
    patch.setattr("torch.version.cuda", "13.0")
    patch.setattr("torch.cuda.is_available", lambda: False)


def copyleft_dependency(patch):
    patch.setattr(distributions, "license_of", lambda name: "AGPL-3.0-only")


def no_dependencies(patch):
    patch.setattr(distributions, "dependency_closure", lambda: [])


def copyleft_beside_a_permissive_license(patch):
    patch.setattr(
        distributions,
        "license_of",
        lambda name: "MIT AND GPL-3.0-only" if name == "rich" else "MIT",
    )


@pytest.mark.parametrize(
    ("name", "defect", "reason"),
    [
        ("requirements_satisfied", too_old_requirement, r"pytest>=999 \(installed: \d"),
        ("requirements_satisfied", missing_requirement, r"installed: nothing"),
        ("requirements_satisfied", no_requirement, "declared is 0 requirements, under"),
        ("lock_matches", other_pin, r"pytest==1\.0 \(installed: \d"),
        ("native_extension", stale_native_build, r"version is 0\.0\.1, expected"),
        ("installed_files_intact", nothing_installed, "files_hashed is 0 files, under its limit"),
        (
            "native_extension",
            extension_of_another_interpreter,
            "built_for_this_interpreter is False",
        ),
        ("native_extension", no_native_build, "problem is No module named"),
        ("torch_build", shadowed_torch, r"metadata_version is 1\.0"),
        ("torch_build", cuda_build_without_driver, "driver_runs_it is False"),
        ("licenses", copyleft_dependency, "refused is .*AGPL-3.0-only"),
        ("licenses", copyleft_beside_a_permissive_license, "refused is 1, .*rich: MIT AND GPL"),
        ("licenses", no_dependencies, "distributions is 0, under"),
    ],
)
def test_a_defect_turns_its_check_red(run_check, monkeypatch, name, defect, reason):
    with monkeypatch.context() as patch:
        defect(patch)
        run = run_check(f"dependencies.{name}")
    assert run.outcome == "fail", run.reason
    assert re.search(reason, run.reason, re.DOTALL), run.reason


@pytest.mark.parametrize("item", ["command_line", "plugin"])
def test_a_heavy_library_at_start_up_is_found(run_check, monkeypatch, tmp_path, item):
    # What a .pth file or a sitecustomize of some installed package does to every interpreter.
    (tmp_path / "locust.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text("import locust\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = run_check("dependencies.import_budget", arguments=("-k", item))
    assert run.outcome == "fail", run.reason
    assert re.search("heavy_modules is 1 modules.*: locust", run.reason), run.reason


def test_a_silent_import_log_proves_nothing(run_check, monkeypatch):
    reading = startup.StartReading(exit_code=0, seconds=0.1, modules=frozenset(), error="")
    monkeypatch.setattr(startup, "start", lambda arguments: reading)
    run = run_check("dependencies.import_budget")
    assert run.outcome == "fail"
    assert "modules is 0, under its limit of 1" in run.reason


def test_the_wall_time_of_a_start_is_recorded(run_check):
    assert run_check("dependencies.import_budget").evidence("wall") > 0


def test_unclear_licenses_are_warned_about(run_check, monkeypatch):
    monkeypatch.setattr(distributions, "license_of", lambda name: "unknown")
    run = run_check("dependencies.licenses")
    assert run.outcome == "warn", run.reason
    assert run.evidence("unclear") > 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MIT", [{"mit"}]),
        ("GPL-3.0-only OR MIT", [{"gpl-3.0-only"}, {"mit"}]),
        ("MIT AND GPL-2.0+", [{"mit", "and", "gpl-2.0"}]),
        ("GPL-3.0-or-later", [{"gpl-3.0"}]),
        (
            "BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1",
            [{"bsd-3-clause", "and", "gcc-exception"}],
        ),
        (
            "GNU General Public License v2 or later (GPLv2+)",
            [{"gnu", "gpl", "v2", "gplv2"}],
        ),
        ("BSD License; GNU General Public License (GPL)", None),
    ],
)
def test_alternatives_of_a_license_text(text, expected):
    found = licenses.alternatives(text)
    assert found == expected if expected is not None else len(found) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AGPL-3.0-or-later", "refused"),
        ("AGPL-3.0", "refused"),
        ("GNU General Public License", "refused"),
        ("GNU Lesser General Public License", "unclear"),
        ("GNU Library or Lesser General Public License (LGPL)", "unclear"),
        ("LGPL-2.1-or-later OR MIT", "allowed"),
        ("Other/Proprietary License", "unclear"),
    ],
)
def test_licenses_that_bind_are_known_in_every_spelling(text, expected):
    """AGPL-3.0-or-later, without its suffix, was no known word, and only warned about."""
    assert licenses.judge(text) == expected


def test_a_wheel_install_without_constraints_is_not_measured(run_check, monkeypatch, tmp_path):
    import shutil

    # The check itself must still be found: only what lies beside the suites is gone.
    suites = tmp_path / "suites"
    shutil.copytree(paths.suites_dir(), suites)
    monkeypatch.setattr(paths, "suites_dir", lambda: suites)
    run = run_check("dependencies.lock_matches")
    assert run.outcome == "not_measured"
    assert "no committed constraints" in run.reason


def distribution(tmp_path, content="x = 1\n"):
    """Lays out an installed distribution with a RECORD by hand, as PEP 376 describes it."""
    import base64
    import hashlib

    digest = hashlib.sha256(b"x = 1\n").digest()
    recorded = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    (tmp_path / "toy.py").write_text(content)
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"toy.py,sha256={recorded},6\ntoy-1.0.dist-info/RECORD,,\n")
    return metadata.Distribution.at(info)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_text("x = 2\n"), "altered is 1 files, expected 0 files .*toy.py"),
        (lambda file: file.unlink(), "missing is 1 files, expected 0 files .*toy.py"),
    ],
)
def test_an_altered_or_missing_file_is_found(run_check, monkeypatch, tmp_path, damage, reason):
    toy = distribution(tmp_path)
    damage(tmp_path / "toy.py")
    true = metadata.distribution
    monkeypatch.setattr(metadata, "distribution", lambda name: toy if name == "toy" else true(name))
    monkeypatch.setattr(
        distributions, "requirements", lambda: [Requirement("click"), Requirement("toy")]
    )
    monkeypatch.setattr(distributions, "DISTRIBUTION", "rich")
    run = run_check("dependencies.installed_files_intact")
    assert run.outcome == "fail", run.reason
    assert re.search(reason, run.reason), run.reason


def test_untouched_files_pass(run_check, monkeypatch, tmp_path):
    toy = distribution(tmp_path)
    true = metadata.distribution
    monkeypatch.setattr(metadata, "distribution", lambda name: toy if name == "toy" else true(name))
    monkeypatch.setattr(distributions, "requirements", lambda: [Requirement("toy")])
    monkeypatch.setattr(distributions, "DISTRIBUTION", "rich")
    assert run_check("dependencies.installed_files_intact").outcome == "pass"


def test_files_without_recorded_hashes_are_not_measured(run_check, monkeypatch, tmp_path):
    toy = distribution(tmp_path)
    (tmp_path / "toy-1.0.dist-info" / "RECORD").write_text("toy.py,,\n")
    true = metadata.distribution
    monkeypatch.setattr(metadata, "distribution", lambda name: toy if name == "toy" else true(name))
    wanted = [Requirement("toy"), Requirement("click")]
    monkeypatch.setattr(distributions, "requirements", lambda: wanted)
    monkeypatch.setattr(distributions, "DISTRIBUTION", "rich")
    run = run_check("dependencies.installed_files_intact")
    assert run.outcome == "not_measured"
    assert "no hashes were recorded for toy" in run.reason


@pytest.mark.parametrize(
    "record",
    [b"toy.py,sha999=aa,6\n", b"toy.py,sha256=aa,six\n", b"toy.py,sha256=aa,6\nt\xe9.py,,\n"],
    ids=["algorithm", "size", "encoding"],
)
def test_a_record_nobody_can_read_is_not_measured(run_check, monkeypatch, tmp_path, record):
    distribution(tmp_path)
    (tmp_path / "toy-1.0.dist-info" / "RECORD").write_bytes(record)
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = [Requirement("toy"), Requirement("click")]
    monkeypatch.setattr(distributions, "requirements", lambda: wanted)
    monkeypatch.setattr(distributions, "DISTRIBUTION", "rich")
    run = run_check("dependencies.installed_files_intact")
    assert run.outcome == "not_measured", run.reason
    assert "no hashes were recorded for toy" in run.reason


def described(directory, name, *fields, version="Version: 1"):
    """Installs the description of a distribution, in the encoding of an old tool."""
    about = directory / f"{name}-1.dist-info" / "METADATA"
    about.parent.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", *([version] if version else []), *fields]
    about.write_bytes("\n".join([*lines, "", ""]).encode("latin-1"))


def test_extras_asked_for_are_part_of_the_closure(monkeypatch, tmp_path):
    for name in ("c", "d"):
        described(tmp_path, name)
    described(tmp_path, "a", "Requires-Dist: b[fast]")
    wanted = ("Requires-Dist: c; extra == 'fast'", "Requires-Dist: d; extra == 'slow'")
    described(tmp_path, "b", *wanted)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert distributions.dependency_closure("a") == ["b", "c"]


def test_metadata_in_another_encoding_are_read(monkeypatch, tmp_path):
    """One author's name ended every check of the suite, and the doctor, with a traceback."""
    described(tmp_path, "numpy", "Author: Andr\xe9", "License: MIT", "Requires-Dist: c")
    described(tmp_path, "c")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert collect_environment()["packages"]["numpy"] == "1"
    assert distributions.dependency_closure("numpy") == ["c"]
    assert distributions.license_of("numpy") == "MIT"
    assert not distributions.unsatisfied([Requirement("numpy>=1")])


def test_a_distribution_without_a_version_is_judged_and_never_clean(monkeypatch, tmp_path):
    """It was left out of the closure: neither its license nor its advisories were looked at."""
    described(tmp_path, "a", "Requires-Dist: b")
    described(tmp_path, "b", "License: AGPL-3.0-only", version="")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert distributions.dependency_closure("a") == ["b"]
    missing = distributions.unsatisfied([Requirement("b>=1")])
    assert [str(entry) for entry in missing] == ["b>=1 (installed: unknown)"]
    installed = {"b": distributions.installed_version("b")}
    records = [CANARY_ADVISORY, affecting("b", versions=["1.0"])]
    result = scan_records(tmp_path, records, installed)
    assert result.state == "not scanned", result


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


def test_requirements_from_before_pep_508_are_part_of_the_closure(monkeypatch, tmp_path):
    """One such distribution ended every check of the suite with a traceback."""
    for name, wanted in (("old-one", "demo (>dev)"), ("demo", "nobody (>=1)")):
        about = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        about.write_text(about.read_text() + f"Requires-Dist: {wanted}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert distributions.dependency_closure("old-one") == ["demo"]


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


def test_an_interpreter_that_cannot_start_the_program_fails(run_check, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    run = run_check("dependencies.import_budget")
    assert run.outcome == "fail"
    assert "exit_code is 1" in run.reason
