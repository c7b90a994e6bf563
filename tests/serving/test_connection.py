"""Connections: each wait for a client has an end, and answers stay in step with their requests."""

import asyncio
import socket
import time

import pytest
import uvicorn
from uvicorn.server import ServerState

from forge_harness.serving.connection import limited_protocol
from forge_harness.serving.exchange import Refusal
from forge_harness.serving.metrics import Metrics
from forge_harness.serving.settings import Settings

from .support import FAULTY, raw, run, running

LATE_S = 20
"""Far beyond every limit of these servers; without one they would wait for ever."""
LENGTH = b"Host: x\r\nContent-Length: 100\r\n\r\n"
PREDICT = b"POST /v1/predict HTTP/1.1\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    """A server with short limits that lets nobody in."""
    path = tmp_path_factory.mktemp("secured")
    keys, tokens = path / "keys.json", path / "tokens.json"
    run("keys", "new", keys)
    token = run("tokens", "issue", tokens, "--keys", keys, "--name", "c", "--role", "client")
    limits = ("--body-s", 1, "--keep-alive-s", 1, "--tokens", tokens, "--keys", keys)
    with running(*limits, script=FAULTY) as server:
        server.bearer = f"Authorization: Bearer {token}\r\n".encode()
        yield server


@pytest.fixture(scope="module")
def full():
    """A server whose queue has no room: after the first refusal the door writes them."""
    limits = ("--body-s", 1, "--keep-alive-s", 1, "--max-queue", 0)
    with running(*limits, script=FAULTY) as server:
        yield server


def until_closed(server, *pieces):
    """Sends a request, and once its answer begins the rest; returns all that was answered."""
    with socket.create_connection(("127.0.0.1", server.port), LATE_S) as connection:
        connection.sendall(pieces[0])
        said = connection.recv(65536)
        for piece in pieces[1:]:
            connection.sendall(piece)
        try:
            while piece := connection.recv(65536):
                said += piece
        except ConnectionResetError:
            pass
    return said


@pytest.mark.parametrize(
    ("head", "rest", "status"),
    [
        (PREDICT + LENGTH, b"x", 401),
        (b"POST /nowhere HTTP/1.1\r\n{bearer}" + LENGTH, b"x", 404),
        (b"GET /healthz HTTP/1.1\r\n" + LENGTH, b"x", 200),
        (PREDICT + LENGTH, b"x" * 100, 401),
        (HEALTH, b"\r\n", 200),
        (HEALTH, b"", 200),
    ],
    ids=["401", "404", "200", "401 and all of its body", "a blank line", "nothing"],
)
def test_a_connection_whose_request_was_answered_is_not_held(secured, head, rest, status):
    said = until_closed(secured, head.replace(b"{bearer}", secured.bearer), rest)
    assert said.startswith(b"HTTP/1.1 %d " % status)
    assert said.count(b"HTTP/1.1") == 1


def test_a_connection_whose_request_was_refused_at_the_door_is_not_held(full):
    refused = PREDICT + b"Host: x\r\nContent-Length: 1\r\n\r\nx"
    said = until_closed(full, refused + PREDICT + LENGTH, b"x")
    assert said.count(b"HTTP/1.1 503 ") == 2


def test_the_rest_of_a_body_that_comes_in_time_does_not_end_the_connection(secured):
    said = until_closed(secured, PREDICT + LENGTH, b"x" * 50, b"x" * 50 + HEALTH)
    assert [answer[:3] for answer in said.split(b"HTTP/1.1 ")[1:]] == [b"401", b"200"]


@pytest.mark.parametrize("closing", [b"", b"Connection: close\r\n"], ids=["", "close"])
@pytest.mark.parametrize(("server", "status"), [("digits_server", 413), ("full", 503)])
def test_who_still_sends_a_body_is_answered(server, status, closing, request):
    """More than a socket takes unread: a connection that closed before would be reset."""
    body = b"x" * 8_000_000
    head = PREDICT + closing + b"Host: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    said = raw(request.getfixturevalue(server), head + body)
    assert said.startswith(b"HTTP/1.1 %d " % status)


def test_what_follows_the_body_of_the_last_answer_gets_none(digits_server):
    head = PREDICT + b"Host: x\r\nContent-Length: 300000\r\n\r\n"

    def of_health():
        lines = digits_server.client.get("/metrics").text.splitlines()
        return [line for line in lines if "received" in line and "/healthz" in line]

    before = of_health()
    said = until_closed(digits_server, head, b"x" * 300_000 + HEALTH)
    assert said.startswith(b"HTTP/1.1 413 ")
    assert said.count(b"HTTP/1.1") == 1
    assert of_health() == before


@pytest.mark.parametrize("server", ["full", "secured"])
def test_an_answer_to_head_has_no_body(server, request):
    """At the door, where the first request was refused a moment ago, and on the long way."""
    refused = PREDICT + b"Host: x\r\nContent-Length: 1\r\n\r\nx"
    head = b"HEAD /v1/predict HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    said = raw(request.getfixturevalue(server), refused + head + last)
    answer, following = said.split(b"HTTP/1.1 405 ")[1].split(b"\r\n\r\n", 1)
    assert b"application/problem+json" in answer
    assert b"content-length: 0" not in answer.lower()
    assert following.startswith(b"HTTP/1.1 200 ")


def test_head_asks_whether_the_server_is_there(secured):
    for path in ("/healthz", "/readyz"):
        answer = secured.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert secured.client.post("/healthz").headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("sent", [b"no HTTP\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_what_is_no_http_gets_a_problem(secured, sent):
    head, _, body = raw(secured, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/problem+json\r\n" in head
    assert head.endswith(b"connection: close")
    assert b'"type": "urn:forge-harness:problem:malformed"' in body


def test_what_is_no_http_is_not_answered_in_the_middle_of_an_answer(byte_lm):
    wanted = b'{"prompt": "x", "max_tokens": 60, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(wanted)
    with running("--step-s", 0.05, script=FAULTY, package=byte_lm) as server:
        said = until_closed(server, head + wanted, b"no HTTP\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200 ")
    assert said.count(b"HTTP/1.1") == 1


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
ROWS = b'{"inputs": [[%s]]}' % b", ".join([b"0.25"] * 64)


@pytest.mark.parametrize("cut", [None, 30, 200, -len(ROWS), -5], ids=str)
def test_a_request_that_offers_another_protocol_is_answered_in_this_one(secured, cut):
    """As Java's client sends them: its body was dropped, and what came next taken for a request."""
    lengths = b"Host: x\r\nContent-Length: %d\r\n" % len(ROWS)
    offering = PREDICT + lengths + secured.bearer + OFFER + b"\r\n" + ROWS
    last = b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n\r\n"
    with socket.create_connection(("127.0.0.1", secured.port), LATE_S) as connection:
        connection.sendall(offering[:cut])
        time.sleep(0.05 if cut else 0)
        connection.sendall(offering[cut:] * bool(cut) + offering + last)
        said = b""
        while piece := connection.recv(65536):
            said += piece
    assert [answer[:3] for answer in said.split(b"HTTP/1.1 ")[1:]] == [b"200"] * 3
    assert said.count(b'"labels":[4]') == 2


def test_what_asks_for_a_tunnel_gets_none(secured):
    asked = b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n"
    assert raw(secured, asked + HEALTH).startswith(b"HTTP/1.1 400 ")


def test_as_many_requests_as_one_read_holds_are_refused_at_the_door():
    """Each was refused inside the one before, and Python ended that at the thousandth call."""
    begun = []

    async def app(scope, receive, send):
        begun.append(scope)
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    def door(scope):
        return Refusal(503, [(b"content-length", b"0")], b"") if begun else None

    async def serve():
        kind = limited_protocol(Settings(), Metrics(), door)
        config = uvicorn.Config(app, http=kind, log_config=None, lifespan="off")
        protocol, client = kind(config, ServerState(), {}), Client()
        protocol.connection_made(client)
        protocol.data_received(HEALTH * 3000)
        await asyncio.gather(*protocol.tasks)
        while protocol.pipeline and not client.is_closing():
            await asyncio.sleep(0)
        return client.written

    written = asyncio.run(serve())
    assert written.count(b"HTTP/1.1 204 ") == len(begun) == 1
    assert written.count(b"HTTP/1.1 503 ") == 2999


def test_who_leaves_is_missed_by_the_request_that_is_answered():
    """Of several in a row uvicorn told the newest, which nobody had begun."""
    told = []

    async def app(scope, receive, send):
        await receive()
        told.append(await asyncio.wait_for(receive(), 1))

    async def serve():
        kind = limited_protocol(Settings(), Metrics())
        config = uvicorn.Config(app, http=kind, log_config=None, lifespan="off")
        protocol = kind(config, ServerState(), {})
        protocol.connection_made(Client())
        protocol.data_received(HEALTH * 2)
        await asyncio.sleep(0)
        protocol.connection_lost(None)
        await asyncio.gather(*protocol.tasks)

    asyncio.run(serve())
    assert told == [{"type": "http.disconnect"}]


class Client:
    """A transport whose client reads nothing: closing it takes for ever."""

    def __init__(self):
        self.is_closed = self.is_aborted = False
        self.written = b""

    def get_extra_info(self, name):
        return None

    def write(self, data):
        self.written += data

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass

    def is_closing(self):
        return self.is_closed or self.is_aborted

    def close(self):
        self.is_closed = True

    def abort(self):
        self.is_aborted = True


@pytest.mark.parametrize(
    "sent",
    [HEALTH, HEALTH.replace(b"Host: x", b"Connection: close"), b"no HTTP\r\n\r\n", None],
    ids=["idle", "last", "unparsable", "shut down"],
)
def test_a_client_that_does_not_read_its_last_answer_does_not_hold_its_connection(sent):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    async def serve():
        settings = Settings(keep_alive_s=0.01, send_s=0.01)
        kind = limited_protocol(settings, Metrics())
        config = uvicorn.Config(app, http=kind, log_config=None, lifespan="off")
        protocol, client = kind(config, ServerState(), {}), Client()
        protocol.connection_made(client)
        protocol.data_received(sent or HEALTH)
        await asyncio.gather(*protocol.tasks)
        if sent is None:
            protocol.shutdown()
        for _ in range(LATE_S * 100):
            if client.is_aborted:
                break
            await asyncio.sleep(0.01)
        return client

    client = asyncio.run(serve())
    assert (client.is_closed, client.is_aborted) == (True, True)


def fed(*pieces, is_read=True):
    """Returns the transport of a connection after these reads, each once what was is answered.

    The answer waits for the whole request if that is read.
    """

    async def app(scope, receive, send):
        while is_read and (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    async def serve():
        kind = limited_protocol(Settings(max_body=1 << 20), Metrics())
        config = uvicorn.Config(app, http=kind, log_config=None, lifespan="off")
        protocol, client = kind(config, ServerState(), {}), Client()
        protocol.connection_made(client)
        for piece in pieces:
            if not client.is_aborted:
                protocol.data_received(piece)
            if not client.is_aborted:
                await asyncio.wait_for(asyncio.gather(*protocol.tasks), LATE_S)
        return client

    return asyncio.run(serve())


BODY = b"x" * 70_000
WITH_BODY = PREDICT + b"Host: x\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


def test_a_body_that_comes_with_the_next_head_is_not_taken_for_headers():
    cut = len(WITH_BODY) + 20
    both = WITH_BODY + WITH_BODY
    client = fed(both[:cut], both[cut:])
    assert not client.is_aborted
    assert client.written.count(b"HTTP/1.1 204 ") == 2


@pytest.mark.parametrize("before", [b"", WITH_BODY], ids=["first", "second"])
@pytest.mark.parametrize("size", [70_000, 7_000], ids=["at once", "in pieces"])
def test_headers_that_do_not_end_are_cut_off(before, size):
    """What came with the end of a message does not count, and everything after it does."""
    endless = b"X-A: " + b"a" * 1000 + b"\r\n"
    head = before + b"GET /healthz HTTP/1.1\r\n"
    lines = [endless * (size // len(endless) + 1)] * (75_000 // size + 1)
    assert fed(head, *lines).is_aborted
    assert not fed(head, endless * 60, b"\r\n").is_aborted


CHUNKED = PREDICT + b"Host: x\r\n{more}Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"


@pytest.mark.parametrize("size", [70_000, 7_000], ids=["at once", "in pieces"])
@pytest.mark.parametrize("line", [b"X-A: " + b"a" * 1000 + b"\r\n", b"a"], ids=["lines", "one"])
def test_trailers_that_do_not_end_are_cut_off(size, line):
    """They come after a body that was whole, so that nothing else would count them."""
    head = CHUNKED.replace(b"{more}", b"")
    pieces = [line * (size // len(line) + 1)] * (75_000 // size + 1)
    assert fed(head + b"X-A: ", *pieces, is_read=False).is_aborted
    assert not fed(head + b"X-A: b\r\nX-B: c\r\n\r\n").is_aborted


@pytest.mark.parametrize("more", [b"", OFFER], ids=["plain", "with an offer"])
def test_a_trailer_is_no_header(secured, more):
    """Or a token would be there or not by how the network cuts the request."""
    sent = CHUNKED.replace(b"{more}", more) + secured.bearer + b"X-Request-Id: trailer\r\n\r\n"
    head, _, body = raw(secured, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 401 ")
    assert b"No token was sent" in body
    assert b"trailer" not in body
