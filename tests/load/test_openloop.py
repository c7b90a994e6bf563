"""What one process of the generator does, in a process of its own: it needs gevent."""

import subprocess
import sys

from forge_harness.load.records import Fate, read_records
from forge_harness.load.validity import generator_problems

from . import support

TWO_ADDRESSES = """
import sys, time
from pathlib import Path
import gevent.socket
real = gevent.socket.getaddrinfo

def two(host, port, *given, **named):
    hosts = ("127.0.0.2", "127.0.0.1") if host == "localhost" else (host,)
    return [found for each in hosts for found in real(each, port, *given, **named)]

gevent.socket.getaddrinfo = two
from forge_harness.load.generator.openloop import OpenLoop
from forge_harness.load.plan import read_plan
directory = Path(sys.argv[1])
plan = read_plan(directory / "plan.json")
OpenLoop(plan, directory, worker=0, of=1, told=lambda *ended: None).run(time.monotonic())
"""
FEW_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
"""
HEAD = """
import sys
from pathlib import Path
from forge_harness.load.generator.openloop import _head
from forge_harness.load.plan import read_plan
from forge_harness.load.traffic import Request
plan = read_plan(Path(sys.argv[1]) / "plan.json")
print(_head(Request(path="/healthz", method="GET"), plan).decode())
"""


def run(code, plan, directory):
    plan.write(directory)
    command = [sys.executable, "-c", code, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_name_stands_for_the_address_at_which_the_server_listens(tmp_path):
    """localhost is ::1 first on most machines, and every request to it was an error."""
    with support.serving() as url:
        named = url.replace("127.0.0.1", "localhost")
        run(TWO_ADDRESSES, support.plan_of(named, 40, ((1, 0.5),)), tmp_path)
    assert {record.fate for record in read_records(tmp_path)} == {Fate.OK}


def test_nothing_listens_at_any_address(tmp_path):
    plan = support.plan_of("http://localhost:1", 40, ((1, 0.2),))
    run(TWO_ADDRESSES, plan, tmp_path)
    assert {record.fate for record in read_records(tmp_path)} == {Fate.ERROR}


def test_a_generator_without_files_blames_no_server(tmp_path):
    """They were errors of the server, which never saw them, and the run failed."""
    with support.serving("--service-ms", 50) as url:
        plan = support.plan_of(url, 100, ((1, 1),))
        run(FEW_FILES + TWO_ADDRESSES, plan, tmp_path)
    records = read_records(tmp_path)
    assert {record.fate for record in records} == {Fate.OK, Fate.DROPPED}
    (found, *_) = generator_problems(records, (), plan)
    assert "not sent: no more files or ports (Too many open files); raise `ulimit -n`" in found


def test_the_deadline_that_is_sent_is_never_none(tmp_path):
    for timeout_s, sent in ((0.0001, 1), (0.25, 250), (2.2, 2200)):
        said = run(HEAD, support.plan_of(timeout_s=timeout_s), tmp_path)
        assert f"X-Deadline-Ms: {sent}\n" in said
