"""run: flags and configuration reach the validator; a run ends with reports, a seal and a code."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from forge_harness.cli.run import Selection, default_workers, make_validator, run_directory
from forge_harness.config import load_config
from forge_harness.errors import ExitCode, StateError
from forge_harness.rundir import read_record
from forge_harness.scoring import verify_run
from forge_harness.security.key_sources import write_keyring
from forge_harness.security.keys import Keyring
from forge_harness.sharding import Shard

SUBJECT = """
class Toy:
    name = "toy"
    def pack(self, codes): ...
    def unpack(self, packed, rows): ...
"""
CHECKS = """
import os, time
import pytest

def mine(name):
    return pytest.mark.forge_check("mine." + name, title="It holds", severity="high")

@mine("good")
def test_good(evidence, forge_seed, forge_config, subject):
    evidence.equal("name", subject.name, expected="toy", reason="handed over")
    evidence.record("seed", forge_seed)
    evidence.record("config_seed", forge_config.run.seed)

@mine("bad")
def test_bad(evidence):
    evidence.at_most("x", 3, limit=2, reason="r")

@mine("slow")
def test_slow(evidence):
    open(os.environ["STARTED"], "w").close()
    time.sleep(300)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(SUBJECT)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test_mine.py").write_text(CHECKS)
    (tmp_path / "forge.toml").write_text(
        '[run]\nsubject = "toy.py:Toy"\nsuite_paths = ["mine"]\nworkers = 1\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_scored_reported_sealed_and_ends_by_its_verdict(forge, project):
    done = forge("run", "--run-dir", "out", "--check", "mine.good", "--check", "mine.bad")
    assert done.returncode == ExitCode.GATE_FAILED, done.stderr
    record = read_record(project / "out")
    assert {check.id: str(check.outcome) for check in record.checks} == {
        "mine.good": "pass",
        "mine.bad": "fail",
    }
    assert " ".join(record.command) == (
        "forge-harness run --run-dir out --check mine.good --check mine.bad"
    )
    assert verify_run(project / "out") == []
    for name in ("report.html", "report.md", "junit.xml"):
        assert (project / "out" / name).stat().st_size > 0
    assert "FAIL, quick scope: 2 of 151 checks (selection: mine.good, mine.bad)" in done.stdout
    assert "Report: out/report.html\n" in done.stdout
    assert done.stdout.endswith("Exit code 1: gate failed.\n")
    assert (
        "Validating subject 'toy': 2 of 151 checks, quick profile, 1 worker. Run: out\n"
        in done.stderr
    )
    assert "checks 2/2" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_modules_of_the_project_are_found_and_none_stands_in_for_the_library(
    forge, project, workers
):
    for name in ("types", "secrets", "queue"):
        (project / f"{name}.py").write_text("raise RuntimeError('not the library')")
    # Of the project's own name, and of an installed package.
    for name in ("mine_to_use", "networkx"):
        (project / f"{name}.py").write_text("HERE = True")
    for file in ("toy.py", "mine/test_mine.py"):
        text = (project / file).read_text()
        (project / file).write_text(f"import networkx, mine_to_use, secrets\nnetworkx.HERE\n{text}")
    done = forge("run", "--run-dir", "out", "--check", "mine.good", "--workers", str(workers))
    assert (project / "out" / "run.json").exists(), done.stderr
    (check,) = read_record(project / "out").checks
    assert check.outcome == "pass", done.stdout


def test_flags_beat_the_environment_in_every_process(forge, project):
    done = forge(
        "run",
        *("--check", "mine.good", "--seed", "7", "--format", "json", "--quiet"),
        env={**os.environ, "FORGE_HARNESS_RUN_SEED": "3"},
    )
    assert done.returncode == ExitCode.PASS, done.stderr
    assert done.stderr == ""
    assert "PARTIAL, quick scope" in done.stdout
    (run,) = (project / "forge-runs").iterdir()
    record = read_record(run)
    seen = {e.name: e.value for e in record.checks[0].evidence}
    assert (record.seed, seen["seed"], seen["config_seed"]) == (7, 7, 7)
    assert (run / "report.json").is_file()
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("again", [False, True], ids=["once", "again_and_again"])
def test_a_stopped_run_ends_with_2_and_a_sealed_directory(project, number, again):
    started = project / "started"
    process = subprocess.Popen(
        [sys.executable, "-m", "forge_harness", "run", "--run-dir", "out", "--check", "mine.slow"],
        env={**os.environ, "STARTED": str(started)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while not started.exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(number)
        # As a CI system does, until the manifest is there and nothing can be lost any more.
        while again and not (project / "out" / "manifest.json").exists():
            assert process.poll() is None, process.communicate()
            process.send_signal(signal.SIGTERM)
            time.sleep(0.01)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == ExitCode.INTERRUPTED, stderr
    assert "Exit code 2: interrupted." in stdout
    assert "Stopped. What was measured is written now.\n" in stderr
    assert "Traceback" not in stderr
    record = read_record(project / "out")
    assert (record.state, str(record.verdict)) == ("interrupted", "INCOMPLETE")
    assert str(record.checks[0].outcome) == "not_measured"
    assert verify_run(project / "out") == []
    assert (project / "out" / "report.html").is_file()


def test_a_run_that_is_stopped_as_it_makes_its_directory_ends_as_well(project):
    """The signal was lost, and the run went on to its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "forge_harness", "run", "--run-dir", "out", "--check", "mine.slow"],
        env={**os.environ, "STARTED": str(project / "started")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not (project / "out").exists():
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == ExitCode.INTERRUPTED, said
    assert read_record(project / "out").state == "interrupted"
    assert verify_run(project / "out") == []


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_run_does_not_end_with_the_reader_of_its_output(project, stream):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "forge_harness", "run", "--run-dir", "out"]
    command += ["--check", "mine.good"]
    with os.fdopen(write, "wb") as nobody:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: nobody}
        done = subprocess.run(command, check=False, timeout=90, **streams)
    assert done.returncode == ExitCode.PASS, done
    record = read_record(project / "out")
    assert (record.state, str(record.checks[0].outcome)) == ("finished", "pass")
    assert verify_run(project / "out") == []


def test_a_closed_terminal_ends_a_run_with_2_and_a_sealed_directory(project):
    child, terminal = pty.fork()
    if child == 0:
        os.environ["STARTED"] = str(project / "started")
        words = [sys.executable, "-m", "forge_harness", "run", "--run-dir", "out"]
        os.execv(sys.executable, [*words, "--check", "mine.slow"])
    try:
        deadline = time.monotonic() + 90
        while not (project / "started").exists() and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                os.read(terminal, 4096)
    finally:
        os.close(terminal)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == ExitCode.INTERRUPTED
    record = read_record(project / "out")
    assert (record.state, str(record.verdict)) == ("interrupted", "INCOMPLETE")
    assert verify_run(project / "out") == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--suite", "trainin"], "Unknown suite 'trainin'. Did you mean 'training'?"),
        (["--check", "data.balence"], "Unknown check 'data.balence'. Did you mean 'data.balance'?"),
        (["--profile", "quik"], "run.profile is 'quik' given by flag; expected one of"),
        (["--seed", "x"], "run.seed is 'x' given by flag; expected an integer from 0"),
        (["--workers", "-1"], "run.workers is -1 given by flag; expected an integer from 0"),
        (["--timeout", "soon"], "run.timeout_s is 'soon' given by flag"),
        (["--policy", "no.toml"], "no.toml does not exist."),
        (["--waivers", "no.toml"], "no.toml does not exist."),
        (["--suite-path", "nowhere"], "nowhere does not exist."),
        (["--policy", "broken.toml"], "broken.toml is not valid TOML"),
        (["--waivers", "broken.toml"], "broken.toml is not valid TOML"),
        (["--config", "no.toml"], "Cannot read configuration file no.toml"),
        (["--format", "pdf"], "Unknown report format 'pdf'."),
        (
            ["--format", ""],
            "No report format given; expected some of html, json, md, junit, ctrf, sarif.",
        ),
        (["--run-dir", "mine"], "is not empty (it holds"),
        (["--run-dir", "toy.py"], "is a file; choose a directory that is new or empty."),
        (["--run-dir", "toy.py/run"], "toy.py/run is below a file; choose a directory that is"),
        (
            ["--config", "runs.toml"],
            "toy.py is a file; expected the directory of runs (paths.runs).",
        ),
        (["--subject", "toy.py:Tyo"], "has no 'Tyo'. Did you mean 'Toy'?"),
    ],
)
def test_bad_input_is_one_sentence_and_4(invoke, project, arguments, sentence):
    (project / "broken.toml").write_text("[x\n")
    (project / "runs.toml").write_text('[paths]\nruns = "toy.py"\n')
    result = invoke("run", *arguments)
    assert result.exit_code == ExitCode.USAGE, result.output
    error = result.stderr.splitlines()
    assert len(error) == 1
    assert sentence in error[0]
    assert not (project / "forge-runs").exists()


@pytest.mark.parametrize(
    "option",
    ["--run-dir", "--subject", "--policy", "--waivers", "--suite-path", "--state", "--shard"],
)
def test_a_variable_that_is_not_set_names_no_default(invoke, project, option):
    """The reference pipeline, say: all of it passes. (Without the refusal the seed is refused.)"""
    result = invoke("run", option, "", "--seed", "x")
    assert result.exit_code == ExitCode.USAGE, result.output
    said = f"Error: Invalid value for '{option}': It is empty; give a value, or leave the option"
    assert said in result.stderr
    assert not (project / "forge-runs").exists()


RUN_KEYS = {
    "run.profile": ("full", "profile", "full"),
    "run.seed": (5, "seed", 5),
    "run.subject": ("toy.py:Toy", "subject_spec", "toy.py:Toy"),
    "run.workers": (3, "workers", 3),
    "run.timeout_s": (2.5, "check_timeout_s", 2.5),
    "run.deadline_s": (60.0, "timeout_s", 60.0),
    "declared.accelerator": ("none", "declared", {"accelerator": "none", "causal_models": "auto"}),
}


@pytest.mark.parametrize("key", RUN_KEYS)
def test_every_key_reaches_the_validator(monkeypatch, tmp_path, key):
    seen = {}

    def capture(policy, subject_spec, **kwargs):
        seen.update(kwargs, policy=policy, subject_spec=subject_spec)

    monkeypatch.setattr("forge_harness.integration.pipeline_validator.PipelineValidator", capture)
    value, argument, expected = RUN_KEYS[key]
    config = tmp_path / "forge.toml"
    config.touch()
    make_validator(load_config(environ={}, file=config), Selection(), config)
    assert seen[argument] != expected
    make_validator(load_config(environ={}, file=config, flags={key: value}), Selection(), config)
    assert seen[argument] == expected


def test_files_and_selections_reach_the_validator(monkeypatch, tmp_path):
    seen = {}

    def capture(policy, subject_spec, **kwargs):
        seen.update(kwargs, policy=policy)

    monkeypatch.setattr("forge_harness.integration.pipeline_validator.PipelineValidator", capture)
    (tmp_path / "p.toml").write_text("[suite_weights]\ndata = 9\n")
    (tmp_path / "w.toml").write_text(
        '[[waiver]]\ncheck = "data.balance"\nowner = "a"\nreason = "r"\nissue = "i"\n'
        'expires = "2999-01-01"\n'
    )
    config = tmp_path / "forge.toml"
    config.write_text(
        '[run]\npolicy = "p.toml"\nwaivers = "w.toml"\nsuite_paths = ["."]\nsubject = ""\n'
    )
    selection = Selection(("data",), ("data.balance",), Shard(1, 2))
    make_validator(load_config(environ={}, file=config), selection, config)
    assert seen["policy"].suite_weights["data"] == 9
    assert [waiver.check for waiver in seen["waivers"]] == ["data.balance"]
    assert seen["suite_paths"] == (tmp_path,)
    assert (seen["suites"], seen["checks"]) == (("data",), ("data.balance",))
    assert seen["shard"] == Shard(1, 2)
    assert seen["config_file"] == config


def test_the_default_directory_is_new_and_named_by_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load_config(environ={})
    with ExitStack() as runs:
        # Runs that have started and not written anything yet.
        paths = [runs.enter_context(run_directory(loaded)) for _ in range(5)]
        assert paths[0].parent == tmp_path / "forge-runs"
        assert time.strptime(paths[0].name, "%Y%m%dT%H%M%SZ")
        assert len(set(paths)) == 5
        (paths[1] / "run.json").write_text("{}")
    # What was never used is gone, and nothing else.
    assert list((tmp_path / "forge-runs").iterdir()) == [paths[1]]
    explicit = load_config(environ={}, flags={"run.run_dir": "mine"})
    with run_directory(explicit) as mine:
        assert mine == tmp_path / "mine"
    assert not mine.exists()


def test_a_refused_run_leaves_no_directory(invoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("run", "--suite", "nope").exit_code == ExitCode.USAGE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cpus", "quota", "workers"),
    [(1, None, 1), (2, None, 2), (64, None, 4), (8, 1.5, 1), (8, 0.5, 1), (8, 3.0, 3)],
)
def test_workers_follow_the_cpus_this_process_may_use(monkeypatch, cpus, quota, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    monkeypatch.setattr("forge_harness.probes.cgroup.cpu_quota", lambda: quota)
    assert default_workers() == workers


@pytest.mark.parametrize(
    ("run_dir", "state", "sentence"),
    [
        ("out", "out/states", "lies within the run directory"),
        ("out", "out", "lies within the run directory"),
        ("states/out", "states", "lies within the state store"),
        ("out", "toy.py", "toy.py is not a directory; expected one for a state store."),
        ("out", "mine", "holds 'test_mine.py' and no state store"),
        ("out", "toy.py/states", "toy.py/states"),
    ],
)
def test_a_store_that_cannot_take_the_run_is_refused_before_it(
    invoke, project, run_dir, state, sentence
):
    result = invoke("run", "--check", "mine.bad", "--run-dir", run_dir, "--state", state)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (project / run_dir).exists()
    assert not (project / "states").exists()


@pytest.fixture
def keyring(tmp_path):
    write_keyring(tmp_path / "keys.json", Keyring.new())
    return tmp_path / "keys.json"


def test_a_sealed_store_takes_the_run_with_its_keys_only(invoke, project, keyring, tmp_path):
    words = ("run", "-q", "--check", "mine.good", "--state", "states")
    kept = invoke(*words, "--run-dir", "one", "--keys", keyring)
    assert kept.exit_code == ExitCode.PASS, kept.output
    assert "Kept as phase5/runs/" in kept.output
    assert b"mine.good" not in b"".join(p.read_bytes() for p in files_of(project / "states"))
    listed = invoke("state", "ls", "--root", "states", "--keys", keyring)
    assert "runs/" in listed.output
    write_keyring(tmp_path / "other.json", Keyring.new())
    for other in ((), ("--keys", tmp_path / "other.json")):
        result = invoke(*words, "--run-dir", "two", *other)
        assert result.exit_code == ExitCode.USAGE, result.output
        assert "--keys" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not (project / "two").exists()


def test_keys_without_a_store_are_refused(invoke, project, keyring):
    result = invoke("run", "--check", "mine.good", "--keys", keyring, "--run-dir", "out")
    assert result.exit_code == ExitCode.USAGE
    assert "--keys needs --state, whose contents they seal." in result.stderr
    assert not (project / "out").exists()


def files_of(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("check", "code"),
    [("mine.bad", ExitCode.GATE_FAILED), ("mine.good", ExitCode.USAGE)],
)
def test_a_store_lost_meanwhile_does_not_hide_how_the_run_ended(
    invoke, project, monkeypatch, check, code
):
    from forge_harness.integration.state_manager import StateManager

    def refuse(*_, **__):
        raise StateError("The disk is full.")

    monkeypatch.setattr(StateManager, "save", refuse)
    result = invoke("run", "-q", "--check", check, "--run-dir", "out", "--state", "states")
    assert result.exit_code == code, result.output
    assert "The run is not kept in states: The disk is full." in result.stderr
    assert verify_run(project / "out") == []
