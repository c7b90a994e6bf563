"""train --state: sealed stores, two trainings of one name, and whoever reads the progress."""

import json
import os
import select
import subprocess
import sys
import time

import pytest

from forge_harness.errors import ExitCode
from forge_harness.security.key_sources import write_keyring
from forge_harness.security.keys import Keyring
from forge_harness.state import Store

TRAIN = ("train", "--task", "digits", "--steps", "6", "--batch-size", "16")


@pytest.fixture
def keys(tmp_path):
    write_keyring(tmp_path / "keys.json", Keyring.new())
    return tmp_path / "keys.json"


@pytest.fixture
def sealed(tmp_path, forge, keys):
    """A store that holds a sealed state already."""
    (tmp_path / "model.bin").write_bytes(b"weights")
    done = forge(
        *("state", "save", tmp_path / "model.bin", "--phase", "5", "--kind", "weights"),
        *("--name", "m", "--root", tmp_path / "states", "--keys", keys),
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / "states"


def test_a_sealed_store_takes_a_training_that_has_its_keys(tmp_path, forge, keys, sealed):
    out = tmp_path / "run"
    done = forge(*TRAIN, "--out", out, "--state", sealed, "--keys", keys)
    assert (done.returncode, done.stderr.count("Error")) == (0, 0), done.stderr
    listed = forge("state", "ls", "--root", sealed, "--keys", keys, "--json")
    names = {state["name"] for state in json.loads(listed.stdout)["states"]}
    assert names == {"m", "run/metrics", "run/package", "run/step-6"}
    verified = forge("state", "verify", "--root", sealed, "--keys", keys)
    assert (verified.returncode, verified.stderr) == (0, "")
    plain = [path.read_bytes() for path in (out / "package").iterdir()]
    stored = [path.read_bytes() for path in sealed.rglob("*") if path.is_file()]
    assert not [one for one in plain for other in stored if one[:200] in other]


def test_a_sealed_training_is_resumed_and_started_from_with_its_keys(tmp_path, forge, keys, sealed):
    out = tmp_path / "run"
    done = forge(*TRAIN, "--out", out, "--state", sealed, "--keys", keys)
    assert done.returncode == 0, done.stderr
    (out / "metrics.json").unlink()
    without = forge("train", "--resume", "--out", out)
    assert without.returncode == ExitCode.USAGE
    assert len(without.stderr.splitlines()) == 1
    assert "--keys" in without.stderr
    resumed = forge("train", "--resume", "--out", out, "--keys", keys)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((out / "metrics.json").read_bytes())["steps"] == 6
    tuned = forge(*TRAIN, "--out", tmp_path / "tuned", "--from-checkpoint", out, "--keys", keys)
    assert tuned.returncode == 0, tuned.stderr


def test_without_its_keys_a_sealed_store_is_refused_and_the_remedy_named(tmp_path, forge, sealed):
    done = forge(*TRAIN, "--out", tmp_path / "run", "--state", sealed)
    assert done.returncode == ExitCode.USAGE
    assert len(done.stderr.splitlines()) == 1
    assert "sealed" in done.stderr
    assert "--keys" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_keys_of_another_store_are_refused_before_it_trains(tmp_path, forge, sealed):
    """What it kept would have opened under no key of the store's others."""
    write_keyring(tmp_path / "other.json", Keyring.new())
    words = ("--out", tmp_path / "run", "--state", sealed, "--keys", tmp_path / "other.json")
    done = forge(*TRAIN, *words)
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--keys", "none.json"), "--keys needs --state"),
        (("--state", "states", "--keys", "none.json"), "none.json"),
        (("--state", "states", "--keys", "env:NOT_SET"), "NOT_SET"),
        (("--state", "states", "--keys", ""), "--keys"),
    ],
)
def test_keys_for_nothing_or_of_nothing_are_refused(tmp_path, forge, words, said):
    done = forge(*TRAIN, "--out", "run", *words, cwd=tmp_path)
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


TRAINS_BESIDE = """
import sys, time
from pathlib import Path
from forge_harness.state import Store

here, other = map(Path, sys.argv[1:3])
commit = Store.commit

def commit_at_once(self, states, **options):
    # Both have looked at the empty store before either commits to it.
    if options.get("note", "").startswith("checkpoint") and not here.exists():
        here.touch()
        deadline = time.monotonic() + 60
        while not other.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
    return commit(self, states, **options)

Store.commit = commit_at_once
from forge_harness.cli import main
main(sys.argv[3:])
"""


def test_the_first_checkpoints_of_two_trainings_of_one_name_do_not_replace_each_other(tmp_path):
    """Both committed to the empty store: what the first was told is kept was gone."""
    states, marks = tmp_path / "states", [tmp_path / "here", tmp_path / "there"]
    both = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", TRAINS_BESIDE, *map(str, order), *TRAIN),
                *("--out", str(tmp_path / side / "run"), "--state", str(states)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for side, order in (("a", marks), ("b", marks[::-1]))
    ]
    said = [process.communicate(timeout=240)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [ExitCode.PASS, ExitCode.USAGE], said
    with Store.open(states) as store:
        notes = [generation.note for generation in store.generations()]
        kept = store.get("phase5", "run/step-6").metadata["run"]
    assert notes == ["checkpoint of run after 6 steps", "result of run"]
    won = tmp_path / "ab"[codes.index(ExitCode.PASS)] / "run"
    assert json.loads((won / "training.json").read_bytes())["run"] == kept
    refused = said[codes.index(ExitCode.USAGE)]
    assert "which began at the same time" in refused.splitlines()[-1]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_training_does_not_end_with_the_reader_of_its_output(tmp_path, stream):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "forge_harness", *TRAIN, "--out", str(tmp_path / "run")]
    with os.fdopen(write, "wb") as nobody:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: nobody}
        done = subprocess.run(command, check=False, timeout=90, **streams)
    assert done.returncode == ExitCode.PASS, done
    assert json.loads((tmp_path / "run" / "metrics.json").read_bytes())["steps"] == 6


@pytest.mark.parametrize("redirection", ["2>&-", ">&-", "2>&- >&-"])
def test_a_training_without_a_stream_is_one(tmp_path, redirection):
    command = f'"$0" -m forge_harness {" ".join(TRAIN)} --out "$1" {redirection}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, str(tmp_path / "run")],
        check=False,
        timeout=90,
        capture_output=True,
    )
    assert done.returncode == ExitCode.PASS, done
    assert json.loads((tmp_path / "run" / "metrics.json").read_bytes())["steps"] == 6


@pytest.mark.parametrize("hangup", ["ignored", "default"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_closed_terminal_ends_no_training_without_a_checkpoint(tmp_path, hangup, plain):
    """nohup means that it goes on; otherwise it ends with 2 and can be resumed."""
    pty = pytest.importorskip("pty")
    out = tmp_path / "run"
    words = [*TRAIN, "--out", str(out)]
    words[words.index("--steps") + 1] = "120"
    child, terminal = pty.fork()
    if child == 0:
        code = (
            "import signal, sys\n"
            f"if {hangup == 'ignored'}: signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
            "from forge_harness.cli import main; main(sys.argv[1:])"
        )
        os.environ["TERM"] = "dumb" if plain else "xterm"
        os.environ.pop("NO_COLOR", None)
        os.execv(sys.executable, [sys.executable, "-c", code, *words])
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                os.read(terminal, 4096)
            if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_bytes():
                break
    finally:
        os.close(terminal)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    steps = len((out / "metrics.jsonl").read_text().splitlines())
    if hangup == "ignored":
        # Nobody reads the last sentence either.
        assert (code, steps) == (ExitCode.INTERRUPTED, 120)
        assert (out / "metrics.json").exists()
        return
    assert code == ExitCode.INTERRUPTED
    assert (out / "checkpoints" / f"step-{steps}.safetensors").exists()


@pytest.mark.parametrize(("out", "state"), [("run", "run"), ("run", "run/states"), ("s/run", "s")])
def test_a_store_and_a_run_within_each_other_are_refused(tmp_path, invoke, monkeypatch, out, state):
    """The files of one lay between those of the other, and a refused start left them there."""
    monkeypatch.chdir(tmp_path)
    done = invoke(*TRAIN, "--out", out, "--state", state)
    assert done.exit_code == ExitCode.USAGE
    assert "within" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
