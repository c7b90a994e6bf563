"""The server's own counters, and when they and ours cannot both be right."""

import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.errors import LoadError
from forge_harness.load.metrics import (
    CountersRefusedError,
    Server,
    answers_by_code,
    labels_of,
    parse,
    total,
    unexplained,
)

from . import support

TEXT = """\
# HELP forge_requests_total Requests.
# TYPE forge_requests_total counter
forge_requests_total{route="/v1/predict",code="200"} 7
forge_requests_total{code="503",route="/v1/predict"} 2.0
forge_requests_total{route="/metrics",code="200"} 5
forge_requests_total{route="/v1/completions",code="200"} 1e1 1700000000000
forge_request_seconds_bucket{le="+Inf",route="a\\"} b"} 3
process_resident_memory_bytes 5.0e+07
forge_nan NaN
garbage here
= 3
"""
codes = st.dictionaries(st.sampled_from([200, 429, 500, 503]), st.integers(0, 50))


def test_samples_are_read():
    found = parse(TEXT)
    assert total(found, "process_resident_memory_bytes") == 5e7
    assert total(found, "forge_requests_total") == 24
    assert total(found, "none") is None
    assert total(found, "forge_nan") is None
    assert dict(found[4].labels)["le"] == "+Inf"


def test_answers_are_counted_for_the_routes_that_were_used():
    assert answers_by_code(parse(TEXT), frozenset({"/v1/predict"})) == {200: 7, 503: 2}
    both = frozenset({"/v1/predict", "/v1/completions"})
    assert answers_by_code(parse(TEXT), both) == {200: 17, 503: 2}
    assert answers_by_code(parse("x 1"), both) is None


def test_what_is_no_route_is_counted_as_unmatched():
    asked = frozenset({"/v1/predict", "/v1/predictt"})
    assert labels_of(parse(TEXT), asked) == {"/v1/predict", "unmatched"}


@given(codes, st.integers(0, 50), st.integers(0, 50))
def test_every_answer_we_read_was_counted_and_only_unanswered_ones_besides(own, lost, some):
    server = Counter(own)
    assert unexplained(own, server, 0) == 0
    server[200] += lost
    assert unexplained(own, server, lost) == 0
    assert unexplained(own, server, max(lost - some, 0)) == min(some, lost)


@given(codes, st.integers(1, 20))
def test_an_answer_the_server_did_not_count_is_unexplained(own, more):
    ours = Counter(own)
    ours[200] += more
    assert unexplained(ours, own, 100) == more


def test_an_answer_counted_under_another_status_is_unexplained():
    assert unexplained({200: 5}, {200: 4, 500: 1}, 0) == 2


def test_nothing_there_is_said_with_the_address():
    with pytest.raises(LoadError, match=r"Nothing answers at http://127\.0\.0\.1:1"):
        Server(url="http://127.0.0.1:1").scrape()


def test_what_no_request_can_carry_is_not_taken_for_silence():
    with pytest.raises(ValueError, match="Invalid header"):
        Server(url="http://127.0.0.1:1", token="a\nb").scrape()


@pytest.fixture
def proxied(monkeypatch):
    """An environment whose proxy is not there."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr("urllib.request._opener", None)  # One that was made before knows none.


def test_a_server_is_asked_itself_as_the_load_is_sent(proxied):
    """By the proxy of the environment it did not answer, or others' counters came back."""
    with support.serving() as url:
        assert "forge_requests_in_flight 0" in Server(url=url).scrape()


def test_what_is_no_http_is_nothing_that_answers():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"220 mail ready\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(LoadError, match=r"Nothing answers .*220 mail ready"):
            Server(url=f"http://127.0.0.1:{listening.getsockname()[1]}").scrape()
        thread.join()


def test_a_redirect_is_not_followed_with_the_token():
    """Who is asked in its place would be told the token, and its counters would be taken."""
    asked = []

    def answer(request):
        asked.append((request.path, request.headers["Authorization"]))
        request.send_response(302)
        request.send_header("Location", f"http://{request.headers['Host']}/elsewhere")
        request.send_header("Content-Length", "0")
        request.end_headers()

    kind = type("Handler", (BaseHTTPRequestHandler,), {"do_GET": answer, "log_message": print})
    with HTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(CountersRefusedError, match=r"answers 302.*it leads to"):
                Server(url=f"http://127.0.0.1:{server.server_port}", token="t").scrape()
        finally:
            server.shutdown()
            thread.join()
    assert asked == [("/metrics", "Bearer t")]


@pytest.mark.parametrize(("status", "remedy"), [(403, "metrics:read"), (503, "its log")])
def test_counters_that_are_refused_are_not_taken_for_none(status, remedy):
    with support.serving("--metrics-status", status) as url:
        Server(url=url).check()
        with pytest.raises(CountersRefusedError, match=f"answers {status}.*{remedy}") as caught:
            Server(url=url).scrape()
    assert caught.value.status == status


def test_a_server_without_counters_has_none():
    with support.serving("--no-metrics") as url:
        assert Server(url=url).scrape() is None
        assert Server(url=url + "/").get("/metrics")[0] == 404
    with support.serving() as url:
        assert "forge_requests_in_flight 0" in Server(url=url, token="t").scrape(at_rest=True)
