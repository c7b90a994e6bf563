"""A real server in a child process, over loopback."""

import asyncio
import concurrent.futures
import contextlib
import json
import signal
import socket
import sqlite3
import ssl
import time
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pytest
import torch
import trustme
from cryptography.hazmat.primitives import serialization

from forge_harness.errors import ExitCode
from forge_harness.formats.detect import open_checkpoint
from forge_harness.load.records import Fate
from forge_harness.load.traffic import judge, read_requests
from forge_harness.model import generate
from forge_harness.model.from_checkpoint import model_from_checkpoint
from forge_harness.security.audit import AuditLog
from forge_harness.security.audit_file import AuditFile
from forge_harness.security.certificates import LocalAuthority
from forge_harness.serving.guard import Guard
from forge_harness.serving.package import load_served
from forge_harness.serving.server import serve
from forge_harness.serving.settings import Settings

from .support import DIGITS, FAULTY, PATIENCE_S, ROOT, ROW, raw, run, running, wait_for


def at_rest(server, route):
    """Whether what was received is what ended, by outcome and by code."""
    received = server.count("forge_requests_received_total", route=route)
    by_outcome = server.count("forge_requests_outcome_total", route=route)
    by_code = server.count("forge_requests_total", route=route)
    in_flight = server.count("forge_requests_in_flight")
    return received == by_outcome == by_code and in_flight == 0


def test_a_prediction_is_what_the_trained_model_computes(digits_server):
    rows = np.random.default_rng(5).random((7, 64), dtype=np.float32)
    answer = digits_server.predict(rows.tolist(), headers={"X-Request-Id": "mine.1"})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "mine.1"
    assert float(answer.headers["x-queue-ms"]) >= 0
    assert int(answer.headers["x-batch-size"]) >= 1
    with open_checkpoint(DIGITS) as checkpoint:
        expected = model_from_checkpoint(checkpoint)(torch.from_numpy(rows))
    got = np.array(answer.json()["logits"], dtype=np.float32)
    assert got.tobytes() == expected.detach().numpy().tobytes()
    assert answer.json()["labels"] == expected.argmax(1).tolist()


def test_a_completion_is_what_the_model_generates_streamed_or_whole(lm_server, byte_lm):
    wanted = {"prompt": "forge", "max_tokens": 20, "temperature": 0.9, "seed": 11}
    whole = lm_server.client.post("/v1/completions", json=wanted).json()
    model = load_served(byte_lm).model.fork()
    expected = list(generate(model, b"forge", max_new_tokens=20, temperature=0.9, seed=11))
    (choice,) = whole["choices"]
    assert choice["tokens"] == expected
    assert whole["usage"] == {"prompt_tokens": 5, "completion_tokens": 20}
    streamed = lm_server.client.post("/v1/completions", json={**wanted, "stream": True})
    assert streamed.headers["content-type"] == "text/event-stream"
    *events, done = [e.removeprefix("data: ") for e in streamed.text.strip().split("\n\n")]
    assert done == "[DONE]"
    *tokens, last = map(json.loads, events)
    assert [event["token"] for event in tokens] == expected
    assert "".join(e["text"] for e in [*tokens, last]) == choice["text"]
    assert (last["finish_reason"], last["usage"]) == ("length", whole["usage"])


def test_a_stream_to_a_client_of_http_1_0_has_no_chunks(lm_server):
    body = json.dumps({"prompt": "forge", "max_tokens": 5, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
    said, _, events = raw(lm_server, head + body).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in said
    assert b"connection: close" in said
    lines = events.decode().split("\n\n")
    assert all(line.startswith("data: ") for line in lines[:-1])
    assert lines[-2:] == ["data: [DONE]", ""]
    assert len(lines) == 5 + 3
    assert wait_for(lambda: at_rest(lm_server, "/v1/completions"), 5)


BAD_BODIES = [
    (b"{", 400),
    (b"\xff", 400),
    (b"[1]", 400),
    (b'{"inputs": [[NaN]]}', 400),
    (b'{"inputs": 1, "inputs": 2}', 400),
    (b"[" * 100_000, 400),
    (b'{"inputs": [[' + b"9" * 10_000 + b"]]}", 400),
    (b"{}", 422),
    (b'{"inputs": []}', 422),
    (b'{"inputs": [[1, 2]]}', 422),
    (b'{"inputs": "0"}', 422),
    (json.dumps({"inputs": [["0"] * 64]}).encode(), 422),
    (json.dumps({"inputs": [[True] * 64]}).encode(), 422),
    (json.dumps({"inputs": [[1e300] * 64]}).encode(), 422),
    (json.dumps({"inputs": [ROW] * 65}).encode(), 422),
    (json.dumps({"inputs": [ROW], "surplus": 1}).encode(), 422),
    (json.dumps({"inputs": [ROW], "model": "other"}).encode(), 404),
]


def test_bad_bodies_are_refused_with_a_problem_and_the_server_goes_on(digits_server):
    for body, status in BAD_BODIES:
        answer = digits_server.client.post("/v1/predict", content=body)
        assert answer.status_code == status, body[:60]
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["status"] == status
        assert problem["request_id"] == answer.headers["x-request-id"]
        assert problem["detail"].endswith((".", "!"))
    assert digits_server.predict().status_code == 200
    assert at_rest(digits_server, "/v1/predict")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/predict", 405),
        ("POST", "/v1/completions", 404),
        ("POST", "/nowhere", 404),
        ("GET", "/healthz", 200),
        ("GET", "/readyz", 200),
        ("GET", "/v1/models", 200),
    ],
)
def test_every_path_has_its_status(digits_server, method, path, status):
    assert digits_server.client.request(method, path).status_code == status


def test_other_media_types_and_wrong_deadlines_are_refused(digits_server):
    text = {"content-type": "text/plain"}
    assert digits_server.client.post("/v1/predict", content=b"{}", headers=text).status_code == 415
    for deadline in ("soon", "-1", "0", "1.5", "9" * 30):
        answer = digits_server.predict(headers={"X-Deadline-Ms": deadline})
        assert answer.status_code == 400, deadline
    longest = int(answer.json()["detail"].rstrip(".").rsplit(" ", 1)[1])
    for deadline, status in ((longest, 200), (longest + 1, 400)):
        answer = digits_server.predict(headers={"X-Deadline-Ms": str(deadline)})
        assert answer.status_code == status, deadline


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"content-encoding": "gzip"}, "Content-Encoding 'gzip'; expected none"),
        ({"content-encoding": "identity, br"}, "Content-Encoding 'identity, br'"),
        ({"content-type": "application/json; charset=utf-16"}, "charset of the body is 'utf-16'"),
        ({"content-type": 'application/json; v=1; CharSet="Latin1"'}, "'latin1'; expected utf-8"),
        ({"content-type": "application/json; charset="}, "charset of the body is ''"),
    ],
)
def test_a_body_that_is_not_plain_json_in_utf_8_is_refused(digits_server, headers, said):
    given = {"content-type": "application/json", **headers}
    answer = digits_server.client.post("/v1/predict", content=b"{}", headers=given)
    assert answer.status_code == 415
    assert answer.headers["content-type"] == "application/problem+json"
    assert said in answer.json()["detail"]
    if "content-encoding" in headers:
        assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/json;charset=UTF-8"},
        {"content-type": 'Application/JSON; charset="utf8"'},
        {"content-encoding": "identity"},
    ],
)
def test_plain_json_may_be_called_so(digits_server, headers):
    assert digits_server.predict(headers=headers).status_code == 200


def test_a_huge_body_is_refused_before_it_is_read(digits_server):
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
    assert raw(digits_server, head).startswith(b"HTTP/1.1 413 ")
    chunk = b"30000\r\n" + b"x" * 0x30000 + b"\r\n"
    chunked = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert raw(digits_server, chunked + chunk + chunk).startswith(b"HTTP/1.1 413 ")
    assert digits_server.predict().status_code == 200


def test_endless_headers_are_cut_off_by_their_size(digits_server):
    with socket.create_connection(("127.0.0.1", digits_server.port), PATIENCE_S) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ")
        with pytest.raises(OSError, match=r"reset|pipe"):
            connection.sendall(b"x" * 30_000_000)
    assert digits_server.predict().status_code == 200


def test_headers_without_end_silence_and_slow_bodies_are_cut_off():
    with running("--header-s", 0.4, "--body-s", 0.4, script=FAULTY) as server:
        connections = [
            socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) for _ in range(3)
        ]
        silent, slow, body = connections
        slow.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nX: ")
        body.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        try:
            assert server.predict().status_code == 200
            assert body.recv(65536).startswith(b"HTTP/1.1 408 ")
            assert [_is_cut(connection) for connection in (silent, slow)] == [True, True]
        finally:
            for connection in connections:
                connection.close()


def _is_cut(connection):
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_client_that_leaves_a_stream_stops_its_work(byte_lm):
    with running("--step-s", 0.05, script=FAULTY, package=byte_lm) as server:
        wanted = {"prompt": "x", "max_tokens": 90, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=wanted) as answer:
            lines = answer.iter_lines()
            seen = sum(next(lines).startswith("data: ") for _ in range(9))
        counted = {"route": "/v1/completions", "outcome": "cancelled"}
        assert wait_for(lambda: server.count("forge_requests_outcome_total", **counted) == 1, 3)
        assert at_rest(server, "/v1/completions")
        assert seen <= server.count("forge_tokens_total") < 60
        assert server.count("forge_batch_size_count") < 60


def test_the_deadline_holds_in_the_queue_and_in_the_middle_of_a_text(byte_lm):
    with running("--step-s", 0.05, script=FAULTY, package=byte_lm) as server:
        wanted = {"prompt": "x", "max_tokens": 90}
        late = server.client.post("/v1/completions", json=wanted, headers={"X-Deadline-Ms": "300"})
        assert (late.status_code, late.json()["title"]) == (504, "The deadline passed")
        # By now the server knows what a step takes.
        shed = server.client.post("/v1/completions", json=wanted, headers={"X-Deadline-Ms": "300"})
        assert shed.status_code == 503
        assert int(shed.headers["retry-after"]) >= 1
        assert server.count("forge_requests_shed_total", reason="wait") == 1


def test_overload_is_shed_at_once_and_health_is_exempt():
    with (
        running("--step-s", 0.1, "--max-batch", 1, "--max-queue", 4, script=FAULTY) as server,
        concurrent.futures.ThreadPoolExecutor(40) as pool,
    ):
        asked = [pool.submit(server.predict) for _ in range(40)]
        assert server.client.get("/readyz").status_code == 200
        answers = [each.result() for each in asked]
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {200, 503}
        assert 4 <= statuses.count(200) <= 20
        for answer in answers:
            if answer.status_code == 503:
                assert int(answer.headers["retry-after"]) >= 1
        assert server.count("forge_requests_shed_total", reason="queue") == statuses.count(503)
        assert server.count("forge_requests_accepted_total") == statuses.count(200)
        assert at_rest(server, "/v1/predict")


def test_refusals_under_overload_keep_the_connection_in_step():
    """Pipelined, in pieces, with a body that follows its refusal, and closed on request."""
    body = json.dumps({"inputs": [ROW]}).encode()

    def request(name, *lines):
        head = ["POST /v1/predict HTTP/1.1", "Host: x", f"X-Request-Id: {name}", *lines]
        return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode(), body

    with (
        running("--step-s", 1.0, "--max-batch", 1, "--max-queue", 2, script=FAULTY) as server,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        waiting = [pool.submit(server.predict) for _ in range(8)]
        while server.count("forge_requests_shed_total") == 0:
            time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.settimeout(PATIENCE_S)
            head, rest = request("a")
            raw.sendall(head)
            time.sleep(0.05)
            (headb, restb), (headc, restc) = request("b"), request("c", "Connection: close")
            raw.sendall(rest + headb + restb + headc[:20])
            time.sleep(0.05)
            raw.sendall(headc[20:] + restc)
            said = b"".join(iter(lambda: raw.recv(65536), b""))
        answers = said.split(b"HTTP/1.1 ")[1:]
        assert [answer[:23] for answer in answers] == [b"503 Service Unavailable"] * 3
        for name, answer in zip((b"a", b"b", b"c"), answers, strict=True):
            assert b"x-request-id: " + name + b"\r\n" in answer.lower()
            assert answer.endswith(b'"request_id": "' + name + b'"}')
            assert b"\r\nretry-after: " in answer.lower()
        statuses = sorted(each.result().status_code for each in waiting)
        assert set(statuses) == {200, 503}
        assert at_rest(server, "/v1/predict")


def test_a_body_that_comes_after_its_refusal_does_not_end_the_connection():
    body = json.dumps({"inputs": [ROW]}).encode()
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with (
        running("--step-s", 1.0, "--max-batch", 1, "--max-queue", 2, script=FAULTY) as server,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        waiting = [pool.submit(server.predict) for _ in range(8)]
        while server.count("forge_requests_shed_total") == 0:
            time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.settimeout(PATIENCE_S)
            raw.sendall(head)
            assert raw.recv(65536).startswith(b"HTTP/1.1 503 ")
            raw.sendall(body)
            # Longer than headers may take, which these bytes are none of.
            time.sleep(Settings().header_s + 0.5)
            raw.sendall(head + body)
            assert raw.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert {each.result().status_code for each in waiting} == {200, 503}


def test_a_killed_inference_thread_is_replaced_and_its_requests_are_answered():
    with running("--step-s", 0.5, script=FAULTY) as server:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(server.predict) for _ in range(4)]
            time.sleep(0.2)
            server.process.send_signal(signal.SIGUSR1)
            statuses = {each.result().status_code for each in asked}
        assert statuses <= {200, 503}
        assert 503 in statuses
        assert wait_for(lambda: server.state() == "ready", 5)
        assert server.count("forge_inference_restarts_total") == 1
        assert server.predict().status_code == 200
        assert at_rest(server, "/v1/predict")
        for _ in range(2):
            server.process.send_signal(signal.SIGUSR1)
            assert wait_for(lambda: server.state() != "ready", 2)
            wait_for(lambda: server.state() in ("ready", "failed"), 5)
        assert server.state() == "failed"
        assert server.predict().status_code == 503
        assert server.client.get("/healthz").status_code == 200
        assert server.stop() == 0


def test_a_hung_inference_thread_shows_within_two_seconds_and_is_replaced():
    with running("--hang-s", 2.5, script=FAULTY) as server:
        server.process.send_signal(signal.SIGUSR2)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.predict)
            assert wait_for(lambda: server.state() == "degraded", 2)
            assert asked.result().status_code == 503
        assert wait_for(lambda: server.state() == "ready", 5)
        assert server.predict().status_code == 200


def test_sigterm_under_load_answers_all_that_was_accepted():
    with (
        running("--step-s", 0.1, "--max-batch", 2, script=FAULTY) as server,
        concurrent.futures.ThreadPoolExecutor(17) as pool,
    ):
        asked = [pool.submit(server.predict) for _ in range(16)]
        assert wait_for(lambda: server.count("forge_requests_accepted_total") == 16, 5)
        stopped = pool.submit(server.stop)
        assert wait_for(lambda: server.state() == "draining", 2)
        refused = server.predict()
        assert [each.result().status_code for each in asked] == [200] * 16
        assert refused.status_code == 503
        assert refused.json()["title"] == "The server is not ready"
        assert stopped.result() == 0


def test_a_server_that_is_stopped_while_idle_ends_with_zero(digits_server):
    with running("--no-auth") as server:
        assert server.predict().status_code == 200
        assert server.stop() == 0


def test_tokens_roles_and_audit_over_tls(keys, tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(cert, append=True)
    certificate.private_key_pem.write_to_path(key)
    tokens, audit = tmp_path / "tokens.json", tmp_path / "audit.db"
    issue = ("tokens", "issue", tokens, "--keys", keys, "--audit", audit, "--name")
    client = run(*issue, "ci", "--role", "client")
    viewer = run(*issue, "eye", "--role", "viewer")
    admin = run(*issue, "root", "--role", "admin")
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    options = ("--tls-cert", cert, "--tls-key", key, "--tokens", tokens, "--audit", audit)
    with running(*options, "--keys", keys, verify=trusted) as server:
        assert server.url.startswith("https://")

        def ask(token, path="/v1/predict"):
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            if path == "/v1/predict":
                return server.predict(headers=headers).status_code
            return server.client.get(path, headers=headers).status_code

        assert [ask(t) for t in (None, "fht_x", client[:-1] + "!", client, viewer)] == [
            401,
            401,
            401,
            200,
            403,
        ]
        paths = ("/metrics", "/v1/models", "/healthz")
        assert [ask(client, path) for path in paths] == [403, 200, 200]
        assert [ask(viewer, path) for path in paths] == [200, 200, 200]
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(old)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(httpx.ConnectError, match="SSL"):
            httpx.get(f"{server.url}/healthz", verify=old)
        assert b"200" not in raw(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        listed = json.loads(run("tokens", "list", tokens, "--keys", keys, "--json"))
        assert client not in json.dumps(listed)
        (revoked,) = (entry["id"] for entry in listed if entry["name"] == "ci")
        run("tokens", "revoke", tokens, revoked, "--keys", keys, "--audit", audit)
        assert ask(client) == 401
        drain = server.client.post("/v1/drain", headers={"Authorization": f"Bearer {viewer}"})
        assert drain.status_code == 403
        drain = server.client.post("/v1/drain", headers={"Authorization": f"Bearer {admin}"})
        assert (drain.status_code, drain.json()) == (202, {"state": "draining"})
        assert server.process.wait(timeout=PATIENCE_S) == 0
    assert "verifies" in run("audit", "verify", audit, "--keys", keys)
    file = AuditFile(audit, read_only=True)
    events = [record.event for record in file.records()]
    file.close()
    seen = [(e.actor, e.action, str(e.decision)) for e in events]
    assert seen[3:5] == [
        ("operator", "serve.start", "allow"),
        ("anonymous", "serve.predict", "deny"),
    ]
    predicts = [e.detail["status"] for e in events if e.action == "serve.predict"]
    assert predicts == [401, 401, 401, 200, 403, 401]
    assert ("root", "serve.drain", "allow") in seen
    assert seen[-1] == ("server", "serve.stop", "allow")
    for secret in (client, viewer, admin):
        assert secret not in repr(events)


def test_the_stop_is_recorded_after_every_request(tmp_path):
    class SlowToRecord(Guard):
        """Commits the records of requests late, as a busy disk does."""

        async def record(self, event):
            await asyncio.sleep(0.5)
            await super().record(event)

    def ask_to_drain(server):
        def ask():
            answers.append(httpx.post(f"{server.url}/v1/drain").status_code)

        client.submit(ask)

    path, answers = tmp_path / "audit.db", []
    guard = SlowToRecord(tokens=None, audit=AuditLog(path, key=b"k" * 32, signing_key=b"s" * 32))
    with concurrent.futures.ThreadPoolExecutor(1) as client:
        code = serve(load_served(DIGITS), Settings(port=0), guard, on_ready=ask_to_drain)
    with contextlib.closing(AuditFile(path, read_only=True)) as file:
        events = [(record.event.actor, record.event.action) for record in file.records()]
    assert (code, answers) == (ExitCode.PASS, [202])
    assert events == [
        ("operator", "serve.start"),
        ("anonymous", "serve.drain"),
        ("anonymous", "serve.drain"),
        ("server", "serve.stop"),
    ]


def test_an_audit_log_that_takes_no_record_closes_the_server(keys, tmp_path):
    audit = tmp_path / "log" / "audit.db"
    audit.parent.mkdir()
    with running("--no-auth", "--audit", audit, "--keys", keys) as server:
        assert server.predict().status_code == 200
        refuse_records(audit)
        answer = server.predict()
        assert answer.status_code == 503
        assert answer.json()["title"] == "The request could not be recorded"
        assert "logits" not in answer.text
        assert server.client.get("/metrics").status_code == 503
        assert server.client.get("/healthz").status_code == 200


def test_a_stream_whose_end_cannot_be_recorded_says_so(byte_lm, keys, tmp_path):
    audit = tmp_path / "audit.db"
    slow = ("--step-s", 0.05, "--audit", audit, "--keys", keys)
    wanted = {"prompt": "x", "max_tokens": 40, "stream": True}
    with (
        running(*slow, script=FAULTY, package=byte_lm) as server,
        server.client.stream("POST", "/v1/completions", json=wanted) as answer,
    ):
        lines = answer.iter_lines()
        first = next(lines)
        refuse_records(audit)
        *tokens, last, done = [line.removeprefix("data: ") for line in lines if line]
    assert [set(json.loads(each)) for each in (first[6:], *tokens)] == [{"text", "token"}] * 40
    assert json.loads(last)["error"]["title"] == "The request could not be recorded"
    assert done == "[DONE]"


def refuse_records(audit):
    """Has the log's own trigger refuse every record from now on."""
    with contextlib.closing(sqlite3.connect(audit)) as connection, connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON event BEGIN SELECT RAISE(ABORT, 'full'); END"
        )


def test_an_expired_certificate_and_an_exposed_server_are_refused(tmp_path, keys):
    authority = trustme.CA()
    past = datetime.now(UTC) - timedelta(days=1)
    certificate = authority.issue_cert("127.0.0.1", not_after=past)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(cert)
    certificate.private_key_pem.write_to_path(key)
    serve = ("serve", "--package", DIGITS, "--port", 0)
    said = run(*serve, "--tls-cert", cert, "--tls-key", key, "--no-auth", expected=4)
    assert "renew it" in said
    assert "--tls-cert and --tls-key, --tokens, --audit" in run(
        *serve, "--host", "0.0.0.0", expected=4
    )


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(tmp_path):
    cert, key = LocalAuthority().issue(tmp_path)
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_bytes(
        private.private_bytes(*form, serialization.BestAvailableEncryption(b"secret"))
    )
    serve = ("serve", "--package", DIGITS, "--port", 0, "--no-auth", "--tls-cert", cert)
    said = run(*serve, "--tls-key", encrypted, expected=4)
    assert "the key not encrypted" in said
    assert "pass phrase" not in said


def test_what_docs_load_asks_of_this_server_is_answered_as_it_expects(digits_server, tmp_path):
    shown = (ROOT / "docs" / "load.md").read_text(encoding="utf-8").splitlines()
    lines = [line for line in shown if line.startswith('{"path"') and '"GET"' in line]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for request in read_requests(tmp_path / "requests.jsonl"):
        answer = digits_server.client.request(request.method, request.path)
        sent_id = answer.headers["x-request-id"]
        given = {"status": answer.status_code, "body": answer.content, "sent_id": sent_id}
        assert judge(request, headers=dict(answer.headers), **given).fate is Fate.OK, request


def test_others_are_not_held_up_by_connections_that_do_nothing(digits_server):
    idle = [
        socket.create_connection(("127.0.0.1", digits_server.port), PATIENCE_S) for _ in range(50)
    ]
    try:
        for connection in idle:
            connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        assert digits_server.predict().status_code == 200
    finally:
        for connection in idle:
            connection.close()
    assert wait_for(lambda: at_rest(digits_server, "/v1/predict"), 5)
