"""`forge-harness load` as a user runs it, against a small real server."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from forge_harness.load.metrics import parse, total

from ..load import support

URL = "http://127.0.0.1:1"


def test_a_run_and_its_report_again(forge, tmp_path):
    out = tmp_path / "l1"
    flags = ("--rate", 60, "--phases", "1x:2,5x:0.5", "--slo", 2)
    with support.serving() as url:
        done = forge("load", "run", "--url", url, "--out", out, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the server's counters leave 0 unexplained" in done.stdout
    assert "PASS" in done.stdout.splitlines()
    assert "load" in done.stderr
    assert {"load.html", "report.json", "load-latency.svg"} <= {p.name for p in out.iterdir()}
    before = (out / "report.json").read_bytes()
    again = forge("load", "report", out, "--json")
    assert again.returncode == 0
    assert (out / "report.json").read_bytes() == before
    assert json.loads(again.stdout) == json.loads(before)


def test_a_server_that_fails_ends_with_one(forge, tmp_path):
    with support.serving("--fail", 0.5) as url:
        done = forge(
            "load", "run", "--url", url, "--out", tmp_path / "l", "--rate", 60,
            "--phases", "1x:2", "--slo", 2, "--quiet",
        )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1x failed requests" in done.stdout
    assert done.stderr == ""


def test_a_server_that_dies_ends_with_one_and_a_report(forge, tmp_path):
    out = tmp_path / "l"
    with support.serving("--exit-at", 1) as url:
        done = forge(
            "load", "run", "--url", url, "--out", out, "--rate", 60,
            "--phases", "1x:2", "--slo", 2, "-q",
        )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "counters could not be read at the end" in done.stdout
    assert json.loads((out / "report.json").read_bytes())["verdict"] == "FAIL"


@pytest.mark.parametrize("command", ["run", "peak"])
def test_a_server_that_dies_in_the_search_ends_with_one_and_is_no_wrong_address(
    forge, tmp_path, command
):
    with support.serving("--exit-at", 0.5) as url:
        done = forge("load", command, "--url", url, "--out", tmp_path / "l", "--slo", 2, "-q")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "after the probe of 20/s it does not any more" in done.stderr
    assert "start a server" not in done.stderr


def test_a_phase_without_requests_is_not_measured(forge, tmp_path):
    with support.serving() as url:
        done = forge(
            "load", "run", "--url", url, "--out", tmp_path / "l", "--rate", 60,
            "--phases", "1x:2,0.0001x:0.5", "--slo", 2, "-q",
        )  # fmt: skip
    assert done.returncode == 7, done.stdout + done.stderr
    assert "0.0001x failed requests: not measured, no request was due in it" in done.stdout


def requests_at(url):
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        return total(parse(answer.read().decode()), "forge_requests_total") or 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_run_that_is_stopped_takes_its_load_with_it(invoke, tmp_path, name):
    out = tmp_path / "l"
    number = signal.Signals[name]
    command = [sys.executable, "-m", "forge_harness", "load", "run", "--out", str(out), "-q"]
    flags = ["--rate", "60", "--phases", "1x:100"]

    def restore():
        # Of a parent that ignores it, as nohup does, a child inherits that.
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)

    with support.serving() as url:
        run = subprocess.Popen(
            [*command, "--url", url, *flags], stderr=subprocess.PIPE, text=True, preexec_fn=restore
        )
        until = time.monotonic() + 30
        while requests_at(url) < 30:
            assert run.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        generators = psutil.Process(run.pid).children(recursive=True)
        assert generators
        run.send_signal(number)
        code = run.wait(30)
        said = run.communicate()[1]
        gone, left = psutil.wait_procs(generators, timeout=20)
        assert (len(gone), left) == (len(generators), [])
        count = requests_at(url)
        time.sleep(0.5)
        assert requests_at(url) == count
    if number != signal.SIGKILL:
        assert code == 2, said
        assert json.loads((out / "report.json").read_bytes())["verdict"] == "INVALID"
        assert said.splitlines()[-1] == "Interrupted."
        assert "report.json" in said
    again = invoke("load", "report", out)
    assert again.exit_code == 7, again.output
    assert "the run was stopped at " in again.output
    assert "0 unexplained" not in again.output


def test_a_token_no_header_can_carry_is_not_said(invoke, monkeypatch, tmp_path):
    monkeypatch.setenv("MYT", "fht_s3cret\nmore")
    done = invoke("load", "run", "--url", URL, "--out", tmp_path / "l", "--token-env", "MYT")
    assert done.exit_code == 4
    assert "--token-env MYT: the variable holds no token" in done.stderr
    assert "s3cret" not in done.output + done.stderr


def test_a_generator_that_gave_up_is_invalid(forge, tmp_path):
    with support.serving("--service-ms", 30) as url:
        done = forge(
            "load", "run", "--url", url, "--out", tmp_path / "l", "--rate", 100,
            "--phases", "1x:1", "--concurrency", 1, "-q",
        )  # fmt: skip
    assert done.returncode == 7, done.stdout + done.stderr
    assert "INVALID" in done.stdout.splitlines()


def test_the_peak(forge, tmp_path):
    flags = ("--probe", 0.5, "--start", 400, "--slo", 0.05, "--cap", 5, "--timeout", 1)
    with support.serving("--service-ms", 20) as url:
        done = forge("load", "peak", "--url", url, *flags, "--json")
    assert done.returncode in (0, 7), done.stderr
    found = json.loads(done.stdout)
    assert found["probes"][0]["rate"] == 400
    assert found["rate"] < 100
    assert "400/s" in done.stderr


def test_a_dry_run_writes_a_plan_for_locust(invoke, tmp_path):
    flags = ("--rate", 5, "--phases", "1x:3", "--seed", 4)
    done = invoke("load", "run", "--url", URL, "--out", tmp_path / "p", "--dry-run", *flags)
    assert done.exit_code == 0, done.output
    plan = json.loads((tmp_path / "p" / "plan.json").read_bytes())
    assert (plan["seed"], plan["phases"][0]["rate"]) == (4, 5)
    assert "locust -f" in done.stdout


def test_a_dry_run_keeps_the_capacity_its_gates_need(invoke, tmp_path):
    flags = ("--capacity", 200, "--phases", "1x:3", "--dry-run")
    done = invoke("load", "run", "--url", URL, "--out", tmp_path / "p", *flags)
    assert done.exit_code == 0, done.output
    plan = json.loads((tmp_path / "p" / "plan.json").read_bytes())
    assert (plan["capacity"], plan["phases"][0]["rate"]) == (200, 20)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--url", "localhost:80"), "'localhost:80' is no address"),
        (("--url", "http://127.0.0.1:1/a b"), "'http://127.0.0.1:1/a b' is no address"),
        (("--url", "http://ada:s3cret@127.0.0.1:1"), "a user name or a password"),
        (("--ca", "none.pem"), "certificate file --ca none.pem does not exist"),
        (("--token-env", "FORGE_NO_SUCH"), "FORGE_NO_SUCH: no such environment variable"),
        (("--requests", "none.jsonl"), "none.jsonl cannot be read"),
        (("--phases", "fast"), "'fast' is no phase"),
        (("--capacity", "lots"), "'lots' is no rate"),
        (("--capacity", "-3"), "'-3' is no rate"),
        (("--dry-run",), "give --rate"),
        (("--rate", "20", "--share", "0.5"), "--rate 20 is the base rate, and --share 0.5 would"),
        (("--rate", "0"), "not in the range"),
        (("--url", "http://127.0.0.1:1/?a=1"), "a query or a fragment"),
        (("--seed", "99999999999999999999999"), "not in the range"),
        (("--timeout", "2000000"), "not in the range"),
        ((), "Nothing answers at http://127.0.0.1:1"),
    ],
)
def test_what_cannot_be_run_is_one_sentence_and_leaves_nothing(invoke, tmp_path, flags, said):
    out = tmp_path / "out"
    done = invoke("load", "run", "--url", URL, "--out", out, *flags)
    assert done.exit_code == 4, done.output
    assert said in done.stderr
    assert not out.exists()


def test_a_directory_that_holds_no_run_is_refused(invoke, tmp_path):
    done = invoke("load", "report", tmp_path)
    assert done.exit_code == 4
    assert "is no load plan" in done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("load") / "l1"
    command = [sys.executable, "-m", "forge_harness", "load", "run", "--url"]
    flags = ["--out", str(out), "--rate", "40", "--phases", "1x:1", "--slo", "2", "-q"]
    with support.serving() as url:
        subprocess.run([*command, url, *flags], capture_output=True, check=False)
    return out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("locust.json", b"[]"),
        ("locust.json", b'{"requests": "x"}'),
        ("locust.json", b"\xff"),
        ("context.json", b"3"),
        ("context.json", b"[1]"),
        ("memory.json", b"3"),
        ("memory.json", b'[["a", 1]]'),
        ("peak.json", b"[]"),
        ("peak.json", b'{"probes": 3}'),
        ("generator-0.json", b"[]"),
        ("generator-0.json", b"{}"),
        ("server-before.prom", b"\xff\xfe"),
        ("records-0.jsonl", b"\xff\xfe"),
        ("records-0.jsonl", b'{"index": "x"}\n{}\n'),
        ("plan.json", b"[" * 100_000),
    ],
)
def test_a_damaged_file_of_a_run_is_one_sentence(invoke, finished, tmp_path, name, content):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert invoke("load", "report", run).exit_code in (0, 1, 7)
    assert name == "peak.json" or (run / name).exists() or name == "memory.json"
    (run / name).write_bytes(content)
    done = invoke("load", "report", run)
    assert done.exit_code == 4, done.output
    assert name in done.stderr
    assert len(done.stderr.splitlines()) == 1
