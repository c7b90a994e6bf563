"""Two replicas behind Ray Serve's proxy: same answers, spread, replaced when killed, drained."""

import contextlib
import importlib.util
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner

from forge_harness.cli.app import app
from forge_harness.errors import ExitCode
from forge_harness.serving.package import load_served

from .support import DIGITS, PATIENCE_S, recorded, running, write_byte_lm

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray Serve is not installed (extra `ray`)")


@pytest.fixture(scope="module")
def server():
    arguments = ("--no-auth", "--engine", "ray", "--replicas", 2, "--drain-s", 20)
    with running(*arguments) as found:
        yield found
        assert found.stop() == 0


def replicas(server):
    """Returns the processes of the replicas."""
    found = psutil.Process(server.pid).children(recursive=True)
    return [p for p in found if "ServeReplica" in " ".join(p.cmdline())]


def answered(server, count, seconds=PATIENCE_S):
    """Asks until `count` replicas have answered; returns their names and all statuses."""
    names, statuses, until = set(), [], time.monotonic() + seconds
    while len(names) < count and time.monotonic() < until:
        answer = server.predict()
        statuses.append(answer.status_code)
        names |= {answer.headers.get("x-forge-replica")} - {None}
    return names, statuses


@needs_ray
def test_two_replicas_answer_with_the_bits_of_the_model_alone(server):
    rng = np.random.default_rng(5)
    rows = rng.uniform(0, 1, (6, 64)).astype(np.float32)
    with torch.inference_mode():
        expected = load_served(DIGITS).model(torch.from_numpy(rows)).numpy()
    seen = set()
    for _ in range(20):
        answer = server.predict(rows.tolist(), headers={"X-Request-Id": "mine"})
        assert answer.json()["request_id"] == "mine"
        assert answer.headers.get_list("x-request-id") == ["mine"]
        logits = np.array(answer.json()["logits"], dtype=np.float32)
        assert logits.tobytes() == expected.tobytes()
        seen.add(answer.headers["x-forge-replica"])
    assert len(seen | answered(server, 2)[0]) == 2


@needs_ray
def test_bad_requests_have_the_same_problems(server):
    wrong = server.client.post("/v1/predict", json={"inputs": [[1, 2]]})
    assert (wrong.status_code, wrong.headers["content-type"]) == (422, "application/problem+json")
    assert wrong.json()["request_id"] == wrong.headers["x-request-id"]
    assert server.client.get("/nowhere").json()["type"] == "urn:forge-harness:problem:not-found"
    assert server.client.get("/v1/predict").status_code == 405
    assert server.client.get("/readyz").json() == {"state": "ready"}
    assert "forge_requests_received_total" in server.client.get("/metrics").text


@needs_ray
def test_a_killed_replica_is_replaced_and_the_other_answers(server):
    before, _ = answered(server, 2)
    victim, survivor = replicas(server)
    victim.kill()
    # A request that was on its way to the dead one may be lost with it; the proxy says so.
    statuses = [server.predict().status_code for _ in range(20)]
    assert statuses.count(200) >= 19
    after, _ = answered(server, 2)
    assert len(after - before) == 1
    assert survivor.is_running()
    assert len(replicas(server)) == 2


def hang_up(process):
    """Does what a closed terminal does to all that runs in it."""
    parent = psutil.Process(process.pid)
    for each in (parent, *parent.children(recursive=True)):
        each.send_signal(signal.SIGHUP)


@needs_ray
@pytest.mark.usefixtures("hang_ups")
@pytest.mark.parametrize("stop", [lambda process: process.terminate(), hang_up])
def test_a_stop_finishes_streams_and_ends_with_zero(tmp_path, keys, stop):
    audit = tmp_path / "audit.db"
    package = write_byte_lm(tmp_path / "lm")
    arguments = ("--no-auth", "--engine", "ray", "--replicas", 1, "--drain-s", 20)
    arguments += ("--audit", audit, "--keys", keys)
    wanted = {"prompt": "a", "max_tokens": 90, "stream": True}
    with running(*arguments, package=package) as server:
        with server.client.stream("POST", "/v1/completions", json=wanted) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            stop(server.process)
            rest = [line for line in lines if line]
        assert first.startswith("data: ")
        assert rest[-1] == "data: [DONE]"
        assert len(rest) == 91  # 89 tokens, the end with its usage, [DONE]
        assert server.process.wait(timeout=PATIENCE_S) == 0
    actions = [event.action for event in recorded(audit)]
    # One start: to end it, no other replica was put in its place.
    assert (actions.count("serve.start"), actions[-1]) == (1, "serve.stop")


def test_what_ray_cannot_do_is_refused_before_it_starts(tmp_path):
    def said(*arguments):
        command = ["serve", "--package", str(DIGITS), "--no-auth", *arguments]
        result = CliRunner().invoke(app, command)
        return result.exit_code, result.output

    (tmp_path / "c.pem").write_text("")
    tls = ("--tls-cert", str(tmp_path / "c.pem"), "--tls-key", str(tmp_path / "c.pem"))
    code, text = said("--engine", "ray", *tls)
    assert (code, "--engine ray does not speak TLS" in text) == (ExitCode.USAGE, True)
    code, text = said("--replicas", "3")
    assert (code, "--replicas is for --engine ray" in text) == (ExitCode.USAGE, True)


@pytest.mark.skipif(HAS_RAY, reason="Ray Serve is installed here")
def test_without_ray_it_says_what_to_install():
    command = ["serve", "--package", str(DIGITS), "--no-auth", "--engine", "ray", "--port", "0"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == ExitCode.USAGE
    assert "pip install 'bitnet-forge-harness[ray]'" in result.output


@needs_ray
def test_a_port_that_is_taken_is_refused_before_ray_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = ["serve", "--package", str(DIGITS), "--no-auth", "--engine", "ray"]
        result = CliRunner().invoke(app, [*command, "--port", str(port)])
    assert result.exit_code == ExitCode.USAGE, result.output
    assert f"Cannot listen on 127.0.0.1:{port}" in result.output


def is_among(processes, name):
    """Whether a process is of this name; one that ended meanwhile is none."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(name in process.name() for process in processes)
    return False


@needs_ray
@pytest.mark.parametrize("first", ["", "ray::DashboardAgent"], ids=["at_once", "late"])
def test_a_stop_while_ray_starts_is_an_interruption(first):
    command = [sys.executable, "-m", "forge_harness", "serve", "--package", str(DIGITS)]
    process = subprocess.Popen(
        [*command, "--no-auth", "--engine", "ray", "--replicas", "1", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + PATIENCE_S
        started = []
        while not is_among(started, first) and time.monotonic() < until:
            time.sleep(0.02)
            started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        output, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert output == ""
    assert process.returncode == ExitCode.INTERRUPTED, errors
    assert errors.strip().endswith("Interrupted.")
    assert psutil.wait_procs(started, timeout=5)[1] == []
