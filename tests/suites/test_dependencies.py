"""Each dependencies check goes red for its own reason."""

import json
import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from forge_harness import kernels, paths
from forge_harness.probes import advisories, distributions

CANARY_ADVISORY = {
    "id": "PYSEC-2014-8",
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


def heavy_start_up(patch):
    patch.setattr(
        "subprocess.run",
        lambda *args, **kwargs: type(
            "Done", (), {"returncode": 0, "stdout": "torch", "stderr": ""}
        ),
    )


@pytest.mark.parametrize(
    ("name", "defect", "reason"),
    [
        ("requirements_satisfied", too_old_requirement, r"pytest>=999 \(installed: \d"),
        ("requirements_satisfied", missing_requirement, r"installed: nothing"),
        ("requirements_satisfied", no_requirement, "declared is 0 requirements, under"),
        ("lock_matches", other_pin, r"pytest==1\.0 \(installed: \d"),
        ("native_extension", stale_native_build, r"version is 0\.0\.1, expected"),
        ("native_extension", no_native_build, "problem is No module named"),
        ("torch_build", shadowed_torch, r"metadata_version is 1\.0"),
        ("torch_build", cuda_build_without_driver, "driver_runs_it is False"),
        ("licenses", copyleft_dependency, "refused is .*AGPL-3.0-only"),
        ("import_budget", heavy_start_up, "heavy_modules is 1 modules.*torch"),
    ],
)
def test_a_defect_turns_its_check_red(run_check, monkeypatch, name, defect, reason):
    with monkeypatch.context() as patch:
        defect(patch)
        run = run_check(f"dependencies.{name}")
    assert run.outcome == "fail", run.reason
    assert re.search(reason, run.reason, re.DOTALL), run.reason


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


def advisory_file(tmp_path, monkeypatch, records):
    path = tmp_path / "osv.json"
    path.write_text(json.dumps(records) if isinstance(records, list) else records)
    monkeypatch.setenv(advisories.FILE_VARIABLE, str(path))


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


def test_an_interpreter_that_cannot_start_the_program_fails(run_check, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    run = run_check("dependencies.import_budget")
    assert run.outcome == "fail"
    assert "exit_code is 1" in run.reason
