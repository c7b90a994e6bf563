"""The locustfile under Locust's own command line: alone, by its web page, master and workers."""

import json
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request

import pytest

from forge_harness.load.analysis import analyse
from forge_harness.load.session import child_environment, locust_command

from . import support

PLAN = {"shape": ((1, 1.5), (2, 1.0)), "base": 80.0, "slo_s": 10.0}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def locust(directory, *options):
    environment = child_environment() | {"FORGE_LOAD_PLAN": str(directory / "plan.json")}
    command = [*locust_command(), "--only-summary", *map(str, options)]
    return subprocess.Popen(
        command, env=environment, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def ends(process):
    try:
        return process.wait(timeout=30), process.stdout.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def check(report):
    books = report.reconciliation
    assert report.problems == ()
    assert books.counts["ok"] == books.scheduled > 200
    assert books.locust == (books.scheduled, 0)


def test_headless_alone(tmp_path):
    with support.serving() as url:
        support.plan_of(url, **PLAN).write(tmp_path)
        code, said = ends(locust(tmp_path, "--headless", "-u", 1, "-r", 1))
    assert code == 0, said
    check(analyse(tmp_path))


def test_a_master_and_two_workers_share_the_schedule(tmp_path):
    port = free_port()
    with support.serving() as url:
        support.plan_of(url, **PLAN).write(tmp_path)
        where = ("--master-host", "127.0.0.1", "--master-port", port)
        workers = [locust(tmp_path, "--worker", *where) for _ in range(2)]
        master = locust(
            tmp_path, "--headless", "--master", "--master-bind-host", "127.0.0.1",
            "--master-bind-port", port, "--expect-workers", 2, "-u", 2, "-r", 2,
        )  # fmt: skip
        try:
            code, said = ends(master)
            assert code == 0, said
        finally:
            ended = [ends(worker) for worker in workers]
    assert [code for code, _ in ended] == [0, 0], ended
    report = analyse(tmp_path)
    check(report)
    shares = [json.loads((tmp_path / f"generator-{i}.json").read_bytes()) for i in (0, 1)]
    assert [share["of"] for share in shares] == [2, 2]
    assert abs(shares[0]["scheduled"] - shares[1]["scheduled"]) <= 1


def test_the_web_page_starts_the_plan(tmp_path):
    port = free_port()
    with support.serving() as url:
        support.plan_of(url, **PLAN).write(tmp_path)
        process = locust(tmp_path, "--web-host", "127.0.0.1", "--web-port", port)
        try:
            swarm(f"http://127.0.0.1:{port}/swarm", process)
            until = time.monotonic() + 20
            while not (tmp_path / "locust.json").exists() and time.monotonic() < until:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        finally:
            _, said = ends(process)
    assert (tmp_path / "locust.json").exists(), said
    check(analyse(tmp_path))


def swarm(address, process):
    form = urllib.parse.urlencode({"user_count": 1, "spawn_rate": 1, "host": ""}).encode()
    until = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(address, data=form, timeout=10) as answer:
                assert json.loads(answer.read())["success"]
                return
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_plan_that_is_none_is_said_at_the_start(tmp_path, text):
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    code, said = ends(locust(tmp_path, "--headless", "-u", 1, "-r", 1))
    assert code != 0
    assert "is no load plan" in said
