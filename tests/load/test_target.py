"""A server that is started for a campaign, and its first answer."""

import signal
import sys

import pytest

from forge_harness.errors import LoadError
from forge_harness.load.target import started
from forge_harness.load.traffic import seeded_digits

from . import support


def test_the_first_answer_comes_from_the_server_itself(monkeypatch):
    """A proxy of the environment was asked, which knows nothing of it."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr("urllib.request._opener", None)  # One that was made before knows none.
    with started([sys.executable, str(support.SERVER), "--ready-line"]) as target:
        assert target.first_answer_s(seeded_digits(0)[0]) is not None


TALKS = """
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        print("x" * 200_000, flush=True)
        self.send_response(200)
        self.end_headers()

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print("Loading the model ...", flush=True)
print(json.dumps({"url": f"http://127.0.0.1:{server.server_port}"}), flush=True)
server.serve_forever()
"""


def test_a_server_that_logs_on_standard_output_is_found_and_goes_on():
    """It said so before its line, was taken for ended, and stood still once a pipe was full."""
    with started([sys.executable, "-c", TALKS]) as target:
        assert target.first_answer_s(seeded_digits(0)[0]) is not None
        assert target.stop() == -signal.SIGTERM


IGNORES = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('{"url": "http://127.0.0.1:1"}', flush=True)
time.sleep(60)
"""


def test_a_server_that_does_not_end_is_killed_and_its_status_says_so():
    with started([sys.executable, "-c", IGNORES]) as target:
        assert target.stop(end_s=0.2) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; print('no'); sys.exit('the port is taken')", "ready: the port is taken$"),
        ("print('only this')", "ready: only this$"),
        ("pass", "ready: it said nothing$"),
        ("import time; print('{', end='', flush=True); time.sleep(60)", "within 0.5 s"),
    ],
)
def test_what_does_not_become_ready_is_said(program, said):
    with (
        pytest.raises(LoadError, match=said),
        started([sys.executable, "-c", program], start_s=0.5 if "sleep" in program else 60),
    ):
        pass
