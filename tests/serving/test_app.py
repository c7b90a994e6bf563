"""The application without a network: permissions of every route, and what is recorded."""

import asyncio
import itertools

import httpx
import pytest

from forge_harness.errors import SecurityError
from forge_harness.security.access import PUBLIC, ROLES, Permission
from forge_harness.security.audit import AuditLog
from forge_harness.security.audit_file import AuditFile
from forge_harness.security.tokens import TokenStore
from forge_harness.serving.app import Application
from forge_harness.serving.exchange import Reply
from forge_harness.serving.guard import AUDIENCE, Guard
from forge_harness.serving.health import Health
from forge_harness.serving.metrics import Metrics
from forge_harness.serving.package import load_served
from forge_harness.serving.problems import NOT_AUDITED, OVERLOADED, Problem
from forge_harness.serving.route import Route
from forge_harness.serving.server import Server
from forge_harness.serving.settings import Settings

from .support import DIGITS

KEY, SEED = bytes(range(32)), bytes(range(1, 33))


@pytest.fixture
def guard(tmp_path):
    tokens = TokenStore(tmp_path / "tokens.json", key=KEY)
    audit = AuditLog(tmp_path / "audit.db", key=KEY, signing_key=SEED, group_s=0.0)
    made = Guard(tokens=tokens, audit=audit)
    made.store, made.path = tokens, tmp_path / "audit.db"
    yield made
    made.close()


def ask(app, method, path, **given):
    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return await client.request(method, path, **given)

    return asyncio.run(run())


def app_of(guard, *routes):
    metrics = Metrics()
    app = Application(routes, guard=guard, metrics=metrics, health=Health())
    return app, metrics


def events(guard):
    file = AuditFile(guard.path, read_only=True)
    found = [record.event for record in file.records()]
    file.close()
    return found


def test_a_route_that_declares_no_permission_ends_the_start(guard):
    async def handler(exchange):
        return Reply()

    with pytest.raises(SecurityError, match=r"GET /open"):
        app_of(guard, Route("/open", "GET", None, handler, "open"))


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://t", 200),
        ("HTTP://T", 200),
        ("http://evil.example", 403),
        ("http://t.evil.example", 403),
        ("http://t:81", 403),
        ("http://[", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_without_tokens_no_page_of_another_site_is_served(origin, status):
    """A browser on this machine sends its POST, with no body and no question asked before."""
    reached = []

    async def handler(exchange):
        reached.append(exchange.path)
        return Reply(body=b"{}")

    drain = Route("/v1/drain", "POST", Permission("server", "drain"), handler, "drain")
    health = Route("/healthz", "GET", PUBLIC, handler, "")
    app, _ = app_of(Guard(tokens=None, audit=None), drain, health)
    headers = {} if origin is None else {"origin": origin}
    assert ask(app, "POST", "/v1/drain", headers=headers).status_code == status
    assert reached == ["/v1/drain"] * (status == 200)
    assert ask(app, "GET", "/healthz", headers=headers).status_code == 200


def test_every_role_may_what_its_table_says_and_every_decision_is_recorded(guard):
    reached = []

    async def handler(exchange):
        reached.append(exchange.request_id)
        return Reply(body=b"{}")

    async def run():
        return Server(load_served(DIGITS), Settings(), guard)

    server = asyncio.run(run())
    declared = server.core.routes()
    routes = [Route(r.path, r.method, r.permission, handler, r.action) for r in declared]
    app, _ = app_of(guard, *routes)
    tokens = {role: guard.store.issue(role, [role], audience=AUDIENCE)[0] for role in ROLES}
    tokens |= {"nobody": None, "other": guard.store.issue("o", ["admin"], audience="x")[0]}
    expected_events = []
    for number, (route, (role, token)) in enumerate(itertools.product(routes, tokens.items())):
        headers = {"X-Request-Id": f"r{number}"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        answer = ask(app, route.method, route.path, headers=headers)
        if route.permission == PUBLIC:
            expected = 200
        elif role in ("nobody", "other"):
            expected = 401
        else:
            expected = 200 if route.permission in ROLES[role] else 403
        assert answer.status_code == expected, (route.path, role)
        assert (f"r{number}" in reached) == (expected == 200)
        if route.action:
            decision = "allow" if expected == 200 else "deny"
            actor = "anonymous" if expected == 401 else role
            expected_events.append((f"r{number}", actor, route.action, decision, expected))
    recorded = [
        (e.request_id, e.actor, e.action, str(e.decision), e.detail["status"])
        for e in events(guard)
    ]
    assert recorded == expected_events


def scope_of(method, path, **headers):
    head = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": head, "client": ("c", 1)}


def counts(metrics):
    """Returns the counters, without those of seconds."""
    lines = metrics.text().decode().splitlines()
    return [line for line in lines if line.startswith("forge_requests") and "_seconds" not in line]


@pytest.mark.parametrize(
    ("method", "token", "status"),
    [
        ("POST", "client", 503),
        ("POST", None, 401),
        ("POST", "auditor", 403),
        ("GET", "client", 405),
    ],
)
def test_the_short_refusal_says_and_counts_what_the_long_one_does(tmp_path, method, token, status):
    tokens = TokenStore(tmp_path / "tokens.json", key=KEY)
    guard = Guard(tokens=tokens, audit=None)
    headers = {"x-request-id": "r1"}
    if token is not None:
        headers["authorization"] = "Bearer " + tokens.issue("t", [token], audience=AUDIENCE)[0]

    async def handler(exchange):
        raise AssertionError("not reached")

    def closed(exchange):
        raise Problem(OVERLOADED, "Too much.", retry_after_s=1.2, reason="queue")

    permission = Permission("model", "predict")
    route = Route("/p", "POST", permission, handler, "p", closed)
    (long, counted), (short, counted_short) = app_of(guard, route), app_of(guard, route)
    answer = ask(long, method, "/p", headers=headers)
    names = {name.replace("-", "_"): value for name, value in headers.items()}
    refusal = short.refuse(scope_of(method, "/p", **names))
    assert (answer.status_code, answer.content) == (refusal.status, refusal.body)
    assert sorted(answer.headers.raw) == sorted(refusal.head)
    assert refusal.status == status
    assert counts(counted) == counts(counted_short)
    assert f'code="{status}"' in "".join(counts(counted_short))


def test_what_is_open_recorded_or_without_a_gate_takes_the_long_way(guard):
    async def handler(exchange):
        return Reply()

    def closed(exchange):
        raise Problem(OVERLOADED, "Too much.")

    permission = Permission("model", "predict")
    free = Guard(tokens=None, audit=None)
    for own, gate in ((free, lambda exchange: None), (free, None), (guard, closed)):
        app, metrics = app_of(own, Route("/p", "POST", permission, handler, "p", gate))
        assert app.refuse(scope_of("POST", "/p")) is None
        assert app.refuse(scope_of("POST", "/elsewhere")) is None
        assert "code=" not in "".join(counts(metrics))


def test_a_handler_that_raises_is_a_problem_counted_and_recorded(guard, caplog):
    token, _ = guard.store.issue("m", ["client"], audience=AUDIENCE)
    predict = Permission("model", "predict")

    async def broken(exchange):
        raise ZeroDivisionError

    async def full(exchange):
        raise Problem(OVERLOADED, "Too much.", retry_after_s=1.2, reason="queue")

    app, metrics = app_of(
        guard,
        Route("/broken", "POST", predict, broken, "x.broken"),
        Route("/full", "POST", predict, full, "x.full"),
    )
    headers = {"Authorization": f"bearer {token}"}
    failed = ask(app, "POST", "/broken", headers=headers)
    assert failed.status_code == 500
    assert "ZeroDivisionError" not in failed.text
    assert "ZeroDivisionError" in caplog.text
    shed = ask(app, "POST", "/full", headers=headers)
    assert (shed.status_code, shed.headers["retry-after"]) == (503, "2")
    text = metrics.text().decode()
    assert 'forge_requests_outcome_total{outcome="failed",route="/broken"} 1.0' in text
    assert 'forge_requests_outcome_total{outcome="shed",route="/full"} 1.0' in text
    assert 'forge_requests_shed_total{reason="queue"} 1.0' in text
    assert [str(event.decision) for event in events(guard)] == ["error", "deny"]


def test_a_path_is_recorded_as_it_came(guard):
    async def handler(exchange):
        return Reply()

    app, _ = app_of(guard, Route("/p", "GET", PUBLIC, handler, "p"))
    for path in ("/p", "/x%0aserve.stop%1b%5b2J", "/%C3%A9"):
        ask(app, "GET", path)
    resources = [event.resource for event in events(guard)]
    assert resources == ["/p", "/x%0aserve.stop%1b%5b2J", "/%C3%A9"]


def test_tokens_that_cannot_be_read_let_nobody_in_and_are_logged_once(tmp_path, caplog):
    """On the long way and at the door, until the file is restored."""
    path = tmp_path / "tokens.json"
    tokens = TokenStore(path, key=KEY)
    token, _ = tokens.issue("c", ["client"], audience=AUDIENCE)

    async def handler(exchange):
        return Reply(body=b"{}")

    route = Route("/p", "POST", Permission("model", "predict"), handler, "p", lambda exchange: None)
    app, _ = app_of(Guard(tokens=tokens, audit=None), route)
    headers = {"authorization": f"Bearer {token}"}
    whole = path.read_bytes()
    for damage in (
        lambda: path.write_bytes(whole[:50]),
        path.unlink,
        path.mkdir,
    ):
        damage()
        caplog.clear()
        for _ in range(3):
            answer = ask(app, "POST", "/p", headers=headers)
            assert (answer.status_code, answer.json()["title"]) == (503, "Tokens cannot be checked")
            assert str(path) not in answer.text
        assert app.refuse(scope_of("POST", "/p", **headers)).status == 503
        assert [(r.levelname, r.exc_info) for r in caplog.records] == [("ERROR", None)]
    path.rmdir()
    path.write_bytes(whole)
    assert ask(app, "POST", "/p", headers=headers).status_code == 200
    assert app.refuse(scope_of("POST", "/p", **headers)) is None


def test_a_refusal_that_fails_takes_the_way_that_says_so():
    async def handler(exchange):
        raise AssertionError("not reached")

    def broken(exchange):
        raise ZeroDivisionError

    route = Route("/p", "POST", PUBLIC, handler, "p", broken)
    app, metrics = app_of(Guard(tokens=None, audit=None), route)
    assert app.refuse(scope_of("POST", "/p")) is None
    answer = ask(app, "POST", "/p")
    assert (answer.status_code, answer.json()["title"]) == (500, "The server failed")
    assert metrics.text().count(b'code="500"') == 1


class Said:
    """Events whose last chunk says whether the end was recorded."""

    def __init__(self):
        self.closed = 0

    async def __aiter__(self):
        yield b"token "

    def last(self, problem=None):
        return b"end" if problem is None else problem.kind.name.encode()

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("takes_the_end", [True, False])
def test_the_end_of_a_stream_is_told_once_it_is_recorded(takes_the_end):
    happened = []

    class Recorder(Guard):
        async def record(self, event):
            happened.append(event.action)
            if event.action == "s.end" and not takes_the_end:
                raise Problem(NOT_AUDITED, "Full.")

    async def handler(exchange):
        return Reply(events=said)

    async def receive():
        raise AssertionError("nothing is read")

    async def send(message):
        if message.get("body"):
            happened.append(message["body"])

    said = Said()
    guard = Recorder(tokens=None, audit=None)
    app, _ = app_of(guard, Route("/s", "GET", PUBLIC, handler, "s"))
    asyncio.run(app(scope_of("GET", "/s"), receive, send))
    last = b"end" if takes_the_end else b"not-audited"
    assert happened == ["s.begin", b"token ", "s.end", last]
    assert said.closed == 1


def test_request_ids_that_could_break_a_log_are_replaced(guard):
    async def handler(exchange):
        return Reply(body=b"{}")

    app, _ = app_of(guard, Route("/h", "GET", PUBLIC, handler, ""))
    for given in ("a b", "x" * 129, "é".encode(), ""):
        answer = ask(app, "GET", "/h", headers={"X-Request-Id": given})
        assert answer.headers["x-request-id"] != given
    ids = {ask(app, "GET", "/h").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
