"""PipelineValidator: whatever happens to the process that runs the checks, the record says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forge_harness.errors import (
    ConfigError,
    ExitCode,
    NothingCollectedError,
    RunDirectoryError,
    SubjectError,
    UsageError,
)
from forge_harness.finish import finish_run
from forge_harness.integration import check_stage
from forge_harness.integration.pipeline_validator import PipelineValidator
from forge_harness.record import Waiver
from forge_harness.rundir import left_files, read_items, read_record
from forge_harness.scoring import exit_code_for, verify_run
from forge_harness.selection import build_policy
from forge_harness.types import Outcome, Profile, Verdict

SUBJECT = """
class Toy:
    name = "toy"
    def pack(self, codes): ...
    def unpack(self, packed, rows): ...
"""

HEADER = """
import os, signal, time
import pytest
def mine(name, severity="high"):
    return pytest.mark.forge_check("mine." + name, title="It", severity=severity)
"""

CHECKS = """
@mine("good")
@pytest.mark.parametrize("n", [1, 2])
def test_good(evidence, subject, tmp_path, n):
    evidence.equal("name", subject.name, expected="toy", reason="it was handed over")
    (tmp_path / "raw").write_text("samples")
    evidence.artifact("raw", tmp_path / "raw")

@mine("bad")
def test_bad(evidence):
    evidence.at_most("x", 3, limit=2, reason="r")

@mine("broken")
def test_broken(evidence, subject):
    raise FloatingPointError("the loss is nan")

@mine("slow")
def test_slow(evidence):
    time.sleep(60)

@mine("dies")
def test_dies(evidence):
    os._exit(11)

@mine("lucky", "low")
def test_waived(evidence):
    evidence.record("x", 1)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's project: a subject file, and a directory for checks of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(SUBJECT, encoding="utf-8")
    (tmp_path / "checks").mkdir()
    return tmp_path


def write_checks(project, source):
    (project / "checks" / "test_mine.py").write_text(HEADER + source, encoding="utf-8")


def make(project, **options):
    options = {"suites": ("mine",), "suite_paths": [project / "checks"], **options}
    return PipelineValidator(None, "toy.py:Toy", command=["run"], **options)


def outcomes(record):
    return {check.id: check.outcome.value for check in record.checks}


def test_a_run_records_each_end_and_verifies(project):
    write_checks(project, CHECKS)
    (project / "checks" / "test_lost.py").write_text("import not_there\n", encoding="utf-8")
    told = []
    expires = "2999-01-01"
    waiver = Waiver(check="mine.lucky", owner="kim", reason="r", issue="#1", expires=expires)
    validator = make(project, workers=2, check_timeout_s=1.5, waivers=[waiver])
    record = validator.validate(project / "run", told.append)
    assert outcomes(record) == {
        "mine.good": "pass",
        "mine.bad": "fail",
        "mine.broken": "error",
        "mine.slow": "error",
        "mine.dies": "error",
        "mine.lucky": "xpass",
    }
    reasons = {check.id: check.reason for check in record.checks}
    assert reasons["mine.broken"] == "FloatingPointError: the loss is nan"
    assert reasons["mine.slow"] == "timed out after 1.5 s"
    assert "died" in reasons["mine.dies"]
    (lost,) = record.unscored_items
    assert "No module named 'not_there'" in lost.reason
    assert record.verdict is Verdict.FAIL
    assert record.subject.name == "toy"
    assert record.scope.suites == ["mine"]
    # Everything is in the directory, and it holds what it claims.
    assert len(told) == 8
    assert {progress.stage for progress in told} == {"checks"}
    assert max(progress.done for progress in told) == 8
    assert len(read_items(project / "run")) == 8
    assert "short test summary" in (project / "run/logs/pytest.log").read_text(encoding="utf-8")
    assert len(list((project / "run/evidence/sha256").iterdir())) == 1
    finish_run(project / "run", record, validator.policy, ())
    assert verify_run(project / "run") == []
    assert read_record(project / "run") == record


def is_running(marker):
    """Returns whether a process has the marker in its command line."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if marker in (process / "cmdline").read_bytes().decode():
                    return True
            except OSError:
                continue
    return False


STUCK = """
import subprocess, sys
@mine("before")
def test_1_before(evidence):
    evidence.record("x", 1)

@mine("stuck")
def test_2_stuck(evidence):
    # As code that never returns to Python: the alarm of pytest-timeout does not reach it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM})
    subprocess.run([sys.executable, "-c", "import time; time.sleep(600)  # %s"])

@mine("after")
def test_3_after(evidence):
    evidence.record("x", 1)
"""


def test_a_hang_ends_the_group_and_is_named(project, monkeypatch):
    marker = f"forge-grandchild-{os.getpid()}"
    write_checks(project, STUCK % marker)
    monkeypatch.setattr(check_stage, "HANG_GRACE_S", 0.5)
    record = make(project, check_timeout_s=1.0).validate(project / "run")
    assert outcomes(record) == {
        "mine.before": "pass",
        "mine.stuck": "error",
        "mine.after": "not_measured",
    }
    (stuck,) = [check for check in record.checks if check.id == "mine.stuck"]
    assert stuck.reason == "timed out after 1 s and could not be stopped"
    assert record.state == "aborted"
    assert "test_2_stuck hung and was ended together with the run" in record.state_reason
    assert not is_running(marker), "what the check started was left behind"


KILLER = """
@mine("before")
def test_1_before(evidence):
    evidence.record("x", 1)

@mine("kills")
def test_2_kills(evidence):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
"""


def test_a_pytest_process_that_is_killed_leaves_the_rest_not_measured(project):
    write_checks(project, KILLER)
    validator = make(project)
    record = validator.validate(project / "run")
    assert outcomes(record) == {"mine.before": "pass", "mine.kills": "not_measured"}
    assert record.state == "aborted"
    assert "killed by SIGKILL, often for memory" in record.state_reason
    assert (record.verdict, exit_code_for(record)) == (Verdict.INCOMPLETE, ExitCode.INCOMPLETE)
    finish_run(project / "run", record, validator.policy, ())
    assert verify_run(project / "run") == []


TWO = """
@mine("before")
def test_1_before(evidence):
    evidence.record("x", 1)

@mine("waits")
def test_2_waits(evidence):
    time.sleep(120)
"""

RUN_IT = """
from pathlib import Path
from forge_harness.integration.pipeline_validator import PipelineValidator
validator = PipelineValidator(None, "toy.py:Toy", suites=("mine",), suite_paths=[Path("checks")])
record = validator.validate(Path("run"), lambda progress: print("told", flush=True))
print(record.state, record.state_reason)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_is_recorded(project, number):
    write_checks(project, TWO)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_IT], cwd=project, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "told\n"
    process.send_signal(number)
    rest, _ = process.communicate(timeout=30)
    assert rest.splitlines()[-1] == "interrupted stopped by the user"
    record = read_record(project / "run")
    assert outcomes(record) == {"mine.before": "pass", "mine.waits": "not_measured"}
    assert (record.verdict, exit_code_for(record)) == (Verdict.INCOMPLETE, ExitCode.INTERRUPTED)


def test_a_thread_that_the_subject_leaves_running_is_not_waited_for(project):
    write_checks(project, CHECKS)
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(50,)).start()\n"
    source = project / "toy.py"
    source.write_text(thread + source.read_text())
    begun = time.monotonic()
    assert make(project).plan().subject.name == "toy"
    assert time.monotonic() - begun < 40


def test_a_subject_that_never_loads_is_given_up_when_the_run_would_be(project):
    write_checks(project, CHECKS)
    (project / "toy.py").write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(SubjectError, match=r"within the 2 s that the whole run may take; give"):
        make(project, timeout_s=2.0).plan()


SLOW_SUBJECT = """
import pathlib, time
pathlib.Path("loading").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_subject_is_loaded_leaves_nothing_behind(project, number, tmp_path):
    (project / "slow.py").write_text(SLOW_SUBJECT)
    command = [sys.executable, "-m", "forge_harness", "run", "--subject", "slow.py:subject"]
    command += ["--check", "environment.python_version", "--run-dir", "run"]
    (project / "tmp").mkdir()
    process = subprocess.Popen(
        command,
        cwd=project,
        env={**os.environ, "TMPDIR": str(project / "tmp")},
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(300):
        if (project / "loading").exists():
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.splitlines()[-1]) == (2, "Interrupted.")
    assert not (project / "run").exists()
    assert list((project / "tmp").iterdir()) == []


def test_a_killed_run_never_verifies_and_takes_its_processes_along(project):
    write_checks(project, TWO)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_IT],
        cwd=project,
        env={**os.environ, "TMPDIR": str(project)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "told\n"
        assert is_running(f"{project}/checks")
        process.kill()
        process.wait(30)
    for _ in range(200):
        if not is_running(f"{project}/checks"):
            break
        time.sleep(0.1)
    else:
        pytest.fail("pytest outlived the run that started it by 20 s")
    record = read_record(project / "run")
    assert (record.state, record.verdict) == ("running", Verdict.INCOMPLETE)
    assert {check.outcome for check in record.checks} == {Outcome.NOT_MEASURED}
    assert "the run was not finished" in {problem.what for problem in verify_run(project / "run")}
    assert [item.check for item in read_items(project / "run")] == ["mine.before"]


@pytest.mark.parametrize(
    ("source", "spec", "message"),
    [
        ("x = 1 / 0", "bad.py:Toy", "raised ZeroDivisionError: division by zero"),
        ("class Toy: pass", "bad.py:Toy", "offers no capability"),
        ("import os; os._exit(3)", "bad.py:Toy", "ended its process .exit status 3"),
        ("import os; os._exit(0)", "bad.py:Toy", "exit status 0.: it said nothing"),
        ("", "gone.py:Toy", "Subject file 'gone.py' does not exist"),
        (SUBJECT, "bad.py:Ty", "has no 'Ty'. Did you mean 'Toy'"),
    ],
    ids=["raises", "empty", "exits", "exits_silently", "missing", "misspelt"],
)
def test_a_subject_that_cannot_be_loaded_stops_before_anything_runs(project, source, spec, message):
    (project / "bad.py").write_text(source, encoding="utf-8")
    validator = PipelineValidator(None, spec, command=[])
    with pytest.raises(SubjectError, match=message) as caught:
        validator.validate(project / "run")
    assert caught.value.exit_code is ExitCode.USAGE
    assert not (project / "run").exists()


def test_wrong_names_and_taken_directories_stop_before_anything_runs(project):
    with pytest.raises(UsageError, match=r"Unknown suite 'dta'\. Did you mean 'data'"):
        make(project, suites=("dta",), suite_paths=()).plan()
    (project / "run").mkdir()
    (project / "run" / "mine.txt").touch()
    with pytest.raises(RunDirectoryError, match="is not empty"):
        make(project).validate(project / "run")


def test_a_name_unknown_for_a_broken_file_says_so(project):
    write_checks(project, "def test_it(: pass")
    with pytest.raises(UsageError, match=r"Unknown suite 'mine'.*test_mine\.py could not be coll"):
        make(project).plan()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (None, "checks holds no check; expected"),
        ("def test_plain(): pass\n", "checks holds no check; expected"),
    ],
    ids=["empty", "unmarked"],
)
def test_a_suite_path_without_a_check_is_refused(project, source, sentence):
    if source is not None:
        write_checks(project, source)
    with pytest.raises(UsageError, match=sentence):
        make(project, suites=(), checks=("environment.python_version",)).plan()


def test_a_name_that_is_only_misspelt_blames_no_file(project):
    write_checks(project, CHECKS)
    with pytest.raises(UsageError, match=r"Unknown suite 'mien'\. Did you mean 'mine'") as caught:
        make(project, suites=("mien",)).plan()
    assert "test_mine.py" not in str(caught.value)


def test_a_name_unknown_for_a_module_that_skips_itself_says_so(project):
    write_checks(project, "pytest.importorskip('not_there')\n" + CHECKS)
    with pytest.raises(UsageError, match=r"Unknown suite 'mine'.*skipped itself.*not_there"):
        make(project).plan()
    (project / "p.toml").write_text("[suite_weights]\nmine = 3\n")
    validator = PipelineValidator(
        build_policy(project / "p.toml"), "toy.py:Toy", suite_paths=[project / "checks"]
    )
    assert validator.plan().policy.suite_weights["mine"] == 3
    (gap,) = validator.gaps
    assert "skipped itself whole: could not import 'not_there'" in gap


@pytest.mark.parametrize("workers", [1, 2])
def test_a_module_that_skips_itself_is_on_the_record(project, workers):
    write_checks(project, TWO.partition('@mine("waits")')[0])
    (project / "checks" / "test_gone.py").write_text(
        "import pytest\npytest.importorskip('not_there')\n" + CHECKS, encoding="utf-8"
    )
    validator = make(project, workers=workers)
    record = validator.validate(project / "run")
    (hidden,) = record.unscored_items
    assert (hidden.hides_checks, hidden.nodeid.endswith("test_gone.py")) == (True, True)
    assert "skipped itself whole: could not import 'not_there'" in hidden.reason
    assert outcomes(record) == {"mine.before": "pass"}
    assert (record.verdict, exit_code_for(record)) == (Verdict.PARTIAL, ExitCode.INCOMPLETE)
    finish_run(project / "run", record, validator.policy)
    assert verify_run(project / "run") == []
    shown = (project / "run" / "report.html").read_text(encoding="utf-8")
    assert "1 module of the suites skipped itself" in shown


def test_a_pytest_that_breaks_while_collecting_is_named(project):
    write_checks(project, CHECKS)
    (project / "checks" / "conftest.py").write_text(
        "def pytest_collection_modifyitems(): raise ValueError('of the conftest')\n"
    )
    with pytest.raises(UsageError, match=r"Unknown suite 'mine'.*while collecting.*of the conft"):
        make(project).plan()


def test_a_suite_path_whose_checks_are_all_nightly_is_not_empty(project):
    source = "@pytest.mark.forge_check('night.a')\ndef test_a(evidence): pass\n"
    write_checks(project, source)
    entry = "[[check]]\nid = 'night.a'\ntitle = 'A'\nsuite = 'night'\nseverity = 'low'\n"
    entry += "component = 'user'\nprofiles = ['nightly']\n"
    (project / "checks" / "catalogue.toml").write_text(entry)
    assert make(project, suites=("environment",)).plan().entries


def test_a_suite_path_that_is_a_text_file_is_refused(project):
    (project / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match=r"notes\.txt is no Python file"):
        make(project, suites=("data",), suite_paths=[project / "notes.txt"]).plan()


def test_a_policy_may_name_the_users_suites_and_nothing_unknown(project):
    write_checks(project, CHECKS)
    file = project / "p.toml"
    file.write_text("[suite_weights]\nmine = 3\n[thresholds.mine]\na.at_least = 1\n")
    validator = PipelineValidator(
        build_policy(file), "toy.py:Toy", suite_paths=[project / "checks"], command=[]
    )
    assert validator.plan().policy.suite_weights["mine"] == 3
    for paths in ([project / "checks"], []):
        file.write_text("[suite_weights]\ndatta = 5\n")
        validator = PipelineValidator(
            build_policy(file), "toy.py:Toy", suite_paths=paths, command=[]
        )
        with pytest.raises(ConfigError, match=r"Unknown suite 'datta'\. Did you mean 'data'"):
            validator.plan()


def test_a_scope_without_checks_is_refused(project):
    nightly = '[[check]]\nid = "mine.a"\ntitle = "A"\nsuite = "mine"\nseverity = "low"\n'
    text = f'{nightly}component = "user"\nprofiles = ["nightly"]\n'
    (project / "checks" / "catalogue.toml").write_text(text, encoding="utf-8")
    with pytest.raises(NothingCollectedError, match="No check is in scope"):
        make(project).plan()


STUDY_SUBJECT = """
from forge_harness.protocols import QualityRun

class Toy:
    name = "toy"
    def quality_plan(self, profile): return [("digits", "ternary", 0), ("digits", "ternary", 1)]
    def quality_run(self, task, arm, seed, profile):
        if seed == FAILS: raise FloatingPointError("the loss is nan")
        return [QualityRun(task=task, arm=arm, seed=seed, steps=1, learning_rate=0.1,
            parameters=1, accuracy=0.5, loss=1.0, block_correct=(1,), block_size=(2,),
            curve=((0, 1.0, -1.0),), finite=True, seconds=0.1, peak_rss_bytes=1,
            data_digest="sha256:0")]
"""
STUDY_CATALOGUE = """
[[check]]
id = "mine.quality"
title = "Quality"
suite = "mine"
severity = "high"
component = "user"
requires = ["MeasuresQuality"]
"""
STUDY_CHECK = """
@pytest.mark.forge_check("mine.quality")
def test_quality(evidence, quality_study):
    seeds = [run.seed for run in quality_study]
    evidence.equal("seeds", str(seeds), expected="[0, 1]", reason="both runs, in plan order")
"""


def test_a_study_that_hangs_is_its_checks_error(project):
    source = STUDY_SUBJECT.replace("if seed == FAILS", "import time; time.sleep(600)\n        if 0")
    (project / "toy.py").write_text(source, encoding="utf-8")
    (project / "checks" / "catalogue.toml").write_text(STUDY_CATALOGUE, encoding="utf-8")
    write_checks(project, STUDY_CHECK)
    record = make(project, check_timeout_s=3).validate(project / "run")
    (check,) = record.checks
    assert check.outcome is Outcome.ERROR
    assert "quality_study could not be built: timed out after 3 s" in check.reason


@pytest.mark.parametrize("fails", [-1, 1], ids=["trains", "raises"])
def test_the_quality_study_is_trained_before_the_checks(project, fails):
    source = STUDY_SUBJECT.replace("FAILS", str(fails))
    (project / "toy.py").write_text(source, encoding="utf-8")
    (project / "checks" / "catalogue.toml").write_text(STUDY_CATALOGUE, encoding="utf-8")
    write_checks(project, STUDY_CHECK)
    told = []
    record = make(project).validate(project / "run", told.append)
    (check,) = record.checks
    if fails < 0:
        assert (check.outcome, check.reason) == (Outcome.PASS, "")
        assert [(p.stage, p.done, p.total) for p in told[:-1]] == [("study", 1, 2), ("study", 2, 2)]
        assert (project / "run" / "study.json").is_file()
        assert set(record.files) == {"study.json", "logs/pytest.log", "logs/study.log"}
        assert record.files == left_files(project / "run")
    else:
        assert check.outcome is Outcome.ERROR
        assert "digits ternary seed 1 raised FloatingPointError: the loss is nan" in check.reason
    assert record.state == "finished"


FILLS = """
import pathlib
@mine("before")
def test_1_before(evidence):
    evidence.record("x", 1)

@mine("fills")
def test_2_fills(evidence):
    with open(DISK + "/ballast", "wb", buffering=0) as stream:
        try:
            while True: stream.write(b"0" * 4096)
        except OSError: pass
    evidence.record("x", 1, samples=[0.5] * 2000)

@mine("after")
def test_3_after(evidence):
    time.sleep(20)
"""


def test_a_full_disk_keeps_what_was_measured(project):
    disk = project / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        write_checks(project, f"DISK = {str(disk)!r}\n{FILLS}")
        validator = make(project)
        record = validator.validate(disk / "run")
        assert record.state == "aborted"
        assert "No space left for run directory" in record.state_reason
        measured = outcomes(record)
        assert (measured["mine.before"], measured["mine.after"]) == ("pass", "not_measured")
        assert exit_code_for(record) is ExitCode.INCOMPLETE
        finish_run(disk / "run", record, validator.policy, ())
        assert verify_run(disk / "run") == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_plan_names_what_will_run(project):
    write_checks(project, TWO)
    plan = make(project, profile=Profile.FULL).plan()
    assert [entry.id for entry in plan.entries] == ["mine.before", "mine.waits"]
    assert plan.subject.capabilities == ["Packs"]
    assert not plan.needs_study
    assert plan.policy.suite_weights["mine"] == 5
