"""Each dependencies check goes red for its own reason."""

import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from forge_harness import kernels, paths
from forge_harness.environment import collect_environment
from forge_harness.probes import distributions, licenses, startup


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
    """Python 3.12 and later leave what is not there out of `Distribution.files`."""
    toy = distribution(tmp_path)
    damage(tmp_path / "toy.py")
    true = metadata.distribution
    there = [file for file in toy.files if (tmp_path / file).exists()]
    monkeypatch.setattr(metadata.Distribution, "files", property(lambda self: there))
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


def test_a_distribution_without_a_version_is_judged(monkeypatch, tmp_path):
    """It was left out of the closure: its license was not looked at."""
    described(tmp_path, "a", "Requires-Dist: b")
    described(tmp_path, "b", "License: AGPL-3.0-only", version="")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert distributions.dependency_closure("a") == ["b"]
    missing = distributions.unsatisfied([Requirement("b>=1")])
    assert [str(entry) for entry in missing] == ["b>=1 (installed: unknown)"]
    assert distributions.installed_version("b") == "unknown"


def test_requirements_from_before_pep_508_are_part_of_the_closure(monkeypatch, tmp_path):
    """One such distribution ended every check of the suite with a traceback."""
    for name, wanted in (("old-one", "demo (>dev)"), ("demo", "nobody (>=1)")):
        about = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        about.write_text(about.read_text() + f"Requires-Dist: {wanted}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert distributions.dependency_closure("old-one") == ["demo"]


def test_an_interpreter_that_cannot_start_the_program_fails(run_check, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    run = run_check("dependencies.import_budget")
    assert run.outcome == "fail"
    assert "exit_code is 1" in run.reason
