"""The end of a server: what it was asked is answered and recorded, or it says that it was not."""

import concurrent.futures
import contextlib
import os
import pty
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import httpx
import pytest

from forge_harness.errors import ExitCode
from forge_harness.serving.server import stop_signals

from .support import DIGITS, FAULTY, PATIENCE_S, ROOT, recorded, running, wait_for

ASKED = {"prompt": "x", "max_tokens": 40}
STEP = ("--step-s", 0.05)
IN_TERMINAL = """
import os, sys
os.open(sys.argv[1], os.O_RDWR)
os.execv(sys.executable, sys.argv[2:])
"""


@contextlib.contextmanager
def locked(audit):
    """Holds the write lock of an audit log, as a backup or a slow disk does."""
    with contextlib.closing(sqlite3.connect(audit, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def actions(audit):
    return [event.action for event in recorded(audit)]


@contextlib.contextmanager
def asked(package, audit, keys, *arguments, count=4):
    """A server in the middle of completions; yields it and their answers to come."""
    audited = ("--audit", audit, "--keys", keys)
    with (
        running(*STEP, *audited, *arguments, script=FAULTY, package=package) as server,
        concurrent.futures.ThreadPoolExecutor(count) as pool,
    ):
        coming = [
            pool.submit(server.client.post, "/v1/completions", json=ASKED) for _ in range(count)
        ]
        # Its own counts cannot be asked for without more records.
        time.sleep(0.5)
        yield server, coming


def signalled(server, audit, number=signal.SIGTERM):
    server.process.send_signal(number)
    return wait_for(lambda: "serve.drain" in actions(audit), PATIENCE_S)


def test_answers_that_wait_for_their_record_are_waited_for(byte_lm, keys, tmp_path):
    audit = tmp_path / "audit.db"
    with asked(byte_lm, audit, keys) as (server, coming):
        assert signalled(server, audit)
        with locked(audit):
            time.sleep(7)
        assert [each.result().status_code for each in coming] == [200] * 4
        assert server.process.wait(timeout=PATIENCE_S) == ExitCode.PASS
    events = recorded(audit)
    assert [e.detail["status"] for e in events if e.action == "serve.completions"] == [200] * 4
    assert (events[-1].action, events[-1].detail["unanswered"]) == ("serve.stop", 0)


def test_answers_that_are_not_recorded_in_time_are_counted_and_not_given(byte_lm, keys, tmp_path):
    audit = tmp_path / "audit.db"
    with asked(byte_lm, audit, keys, "--drain-s", 3) as (server, coming):
        assert signalled(server, audit)
        with locked(audit):
            for each in coming:
                assert isinstance(each.exception(), httpx.TransportError)
        assert server.process.wait(timeout=PATIENCE_S) == ExitCode.INCOMPLETE
        assert "Traceback" not in server.process.stderr.read()
    last = recorded(audit)[-1]
    assert (last.action, last.detail["unanswered"]) == ("serve.stop", 4)


def test_a_request_that_was_not_admitted_counts_too(keys, tmp_path):
    audit = tmp_path / "audit.db"
    limits = ("--audit", audit, "--keys", keys, "--drain-s", 1)
    with (
        running(*limits, script=FAULTY, package=DIGITS) as server,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as other,
    ):
        # Keeps the server from ending before the lock is there.
        other.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        assert wait_for(lambda: server.count("forge_requests_received_total") >= 1, PATIENCE_S)
        assert signalled(server, audit)
        with locked(audit):
            coming = pool.submit(other.recv, 65536)
            assert coming.result() == b""
        assert server.process.wait(timeout=PATIENCE_S) == ExitCode.INCOMPLETE
    assert recorded(audit)[-1].detail["unanswered"] == 1


@pytest.mark.usefixtures("hang_ups")
def test_a_hang_up_drains_and_those_that_follow_it_do_not_hurry(byte_lm, keys, tmp_path):
    audit = tmp_path / "audit.db"
    with asked(byte_lm, audit, keys, count=1) as (server, (coming,)):
        assert signalled(server, audit, signal.SIGHUP)
        server.process.send_signal(signal.SIGHUP)
        assert coming.result().status_code == 200
        assert server.process.wait(timeout=PATIENCE_S) == ExitCode.PASS
    assert actions(audit) == ["serve.start", "serve.drain", "serve.completions", "serve.stop"]


def test_a_second_signal_does_not_wait(byte_lm, keys, tmp_path):
    audit = tmp_path / "audit.db"
    with asked(byte_lm, audit, keys, count=1) as (server, (coming,)):
        assert signalled(server, audit)
        server.process.send_signal(signal.SIGTERM)
        assert coming.result().status_code == 503
        assert server.process.wait(timeout=PATIENCE_S) == ExitCode.INCOMPLETE
    assert recorded(audit)[-1].detail["unanswered"] == 1


@pytest.mark.usefixtures("hang_ups")
def test_a_server_whose_terminal_is_closed_ends_in_order(keys, tmp_path):
    audit = tmp_path / "audit.db"
    serve = (sys.executable, "-m", "forge_harness", "serve", "--package", DIGITS, "--port", 0)
    command = (*serve, "--no-auth", "--audit", audit, "--keys", keys)
    ours, its = pty.openpty()
    # The first terminal that the leader of a session opens is the one that hangs up on it.
    server = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, os.ttyname(its), *map(str, command)],
        cwd=ROOT,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
    )
    try:
        os.close(its)
        said = b""
        while b'"ready": true' not in said:
            said += os.read(ours, 4096)
        os.close(ours)
        assert server.wait(timeout=PATIENCE_S) == ExitCode.PASS
    finally:
        server.kill()
        server.wait()
    assert actions(audit)[-1] == "serve.stop"


@pytest.mark.usefixtures("hang_ups")
def test_a_hang_up_that_is_ignored_stays_so():
    assert signal.SIGHUP in stop_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert stop_signals() == [signal.SIGTERM, signal.SIGINT]
