"""The server from outside: TLS 1.3, roles, tokens, and a record of everything that was asked."""

import http.client
import ssl
import threading
import time
import warnings
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from forge_harness.errors import LoadError, several
from forge_harness.load.plan import LoadPlan
from forge_harness.load.session import server_of
from forge_harness.load.target import started
from forge_harness.security.certificates import LocalAuthority

WAIT_S = 30
REVOKED_S = 5.0
"""Longest a revoked token may still open something: a cache is no defect, a restart is."""
PUBLIC = ("GET /healthz", "GET /readyz")
UNDECLARED = ("GET /", "GET /admin", "GET /v1/nothing", "POST /metrics", "DELETE /v1/models")


@pytest.mark.forge_check("security.tls_1_3_only")
def test_tls_1_3_only(subject, evidence, tmp_path):
    """The server speaks TLS 1.3 and nothing older; our client believes no other certificate.

    Older protocols are offered by a client that has them. Certificates of another authority, an
    expired one and one of another name are shown to the client that sends load. Oracle: Python's
    ssl (OpenSSL) on the other side.
    """
    (tmp_path / "server").mkdir()
    spec = subject.server(tmp_path / "server", secured=True)
    with started(spec.command) as target:
        evidence.equal(
            "protocol",
            _protocol(target.url, spec.ca) or "none",
            expected="TLSv1.3",
            reason="as negotiated",
        )
        accepted = [
            version.name
            for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2)
            if _protocol(target.url, spec.ca, highest=version)
        ]
        evidence.equal(
            "older_accepted", len(accepted), expected=0, reason=", ".join(accepted) or "none"
        )
        plain = _plain(target.url)
        evidence.equal("plain_answered", plain, expected=False, reason="HTTP without TLS")
        strange = LocalAuthority().write(tmp_path / "strange.pem")
        evidence.equal(
            "client_believes_another_authority",
            _client_believes(target.url, strange),
            expected=False,
            reason="a certificate the client's authority did not sign",
        )
        evidence.equal(
            "client_believes_ours",
            _client_believes(target.url, spec.ca),
            expected=True,
            reason="ca",
        )
    yesterday = datetime.now(UTC) - timedelta(days=1)
    for name, changes in (
        ("expired", {"until": yesterday}),
        ("misnamed", {"address": "192.0.2.1"}),
        ("sound", {}),
    ):
        authority = LocalAuthority()
        cert, key = authority.issue(tmp_path / name, **changes)
        with _https(cert, key) as url:
            believed = _client_believes(url, authority.write(tmp_path / f"{name}.pem"))
        evidence.equal(
            f"client_believes_{name}", believed, expected=name == "sound", reason="certificate"
        )


def _protocol(url, ca, *, highest=None):
    context = ssl.create_default_context(cafile=ca)
    if highest is not None:
        with warnings.catch_warnings():
            # That the old ones are deprecated is what is tested.
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            context.maximum_version = highest
        # Above this level OpenSSL refuses old protocols by itself, and nothing was tested.
        context.set_ciphers("ALL:@SECLEVEL=0")
    host, port = urlsplit(url).hostname, urlsplit(url).port
    connection = http.client.HTTPSConnection(host, port, context=context, timeout=WAIT_S)
    try:
        connection.connect()
        return connection.sock.version()
    except (ssl.SSLError, OSError):
        return None
    finally:
        connection.close()


def _plain(url):
    connection = http.client.HTTPConnection(
        urlsplit(url).hostname, urlsplit(url).port, timeout=WAIT_S
    )
    try:
        connection.request("GET", "/healthz")
        connection.getresponse()
        return True
    except (http.client.HTTPException, OSError):
        return False
    finally:
        connection.close()


def _client_believes(url, ca):
    plan = LoadPlan(url=url, seed=0, phases=(), ca=str(ca))
    try:
        server_of(plan).check()
    except LoadError:
        return False
    return True


class _Empty(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass


@contextmanager
def _https(cert, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server = _Quiet(("127.0.0.1", 0), _Empty)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.forge_check("security.rbac_matrix")
def test_rbac_matrix(subject, evidence, tmp_path):
    """Every token at every route: allowed where its role says so, refused everywhere else.

    Tokens of each role and ones that are expired, revoked, malformed, unknown, of another service
    or missing; every declared route, routes nobody declared, and the public ones without a token;
    one token that is revoked while the server runs. Oracle: the table of the subject, written apart
    from its roles; 401 for who is nobody, 403 for who may not.
    """
    spec = subject.server(tmp_path, secured=True)
    holders = {**spec.tokens, "nobody": None}
    access = {**spec.access, "nobody": frozenset()}
    wrong, cells, still_open = [], 0, None
    with started(spec.command) as target:
        for route in PUBLIC:
            cells += 1
            if _status(target.url, spec.ca, route, None) not in (200, 503):
                wrong.append(f"{route} needs a token")
        # What a subject declares is held to its own table below.
        for route in (each for each in UNDECLARED if each not in spec.routes):
            for name, token in holders.items():
                cells += 1
                status = _status(target.url, spec.ca, route, token)
                if status < 400:
                    wrong.append(f"{name}: {route} is {status}")
        for route in spec.routes:
            name = _leaver(access, route)
            if route == spec.routes[-1] and spec.revoke is not None and name is not None:
                still_open = _open_after_revoking(spec, target.url, name, access[name])
                access[name] = frozenset()
            # Whoever may end the server asks last.
            for name, token in sorted(holders.items(), key=lambda held: route in access[held[0]]):
                cells += 1
                status = _status(target.url, spec.ca, route, token)
                if not _as_declared(status, access[name], route):
                    wrong.append(f"{name}: {route} is {status}")
    allowed = sum(route in routes for routes in access.values() for route in spec.routes)
    if still_open is None:
        evidence.record("still_open", "not held", reason="the subject revokes nothing meanwhile")
    else:
        evidence.equal(
            "still_open",
            len(still_open),
            expected=0,
            unit="routes",
            reason=f"{REVOKED_S:g} s after a token was revoked: {', '.join(still_open) or 'none'}",
        )
    evidence.at_least("allowed", allowed, limit=1, unit="cells", reason="or nothing may be asked")
    evidence.record("cells", cells, unit="cells", reason=several(len(holders), "holder"))
    evidence.equal(
        "wrong_cells",
        len(wrong),
        expected=0,
        unit="cells",
        reason="; ".join(wrong[:3]) or "all as declared",
    )


def _leaver(access, last_route):
    """Who loses its token: somebody who may ask for something, and cannot end the server."""
    names = [name for name, routes in access.items() if routes and last_route not in routes]
    return min(names, default=None)


def _open_after_revoking(spec, url, name, routes):
    """Revokes a token, waits until it opens nothing, and returns what it still opens."""
    spec.revoke(name)
    until = time.monotonic() + REVOKED_S
    while True:
        asked = {route: _status(url, spec.ca, route, spec.tokens[name]) for route in sorted(routes)}
        left = [f"{name}: {route} is {status}" for route, status in asked.items() if status != 401]
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.1)


def _as_declared(status, routes, route):
    if route in routes:
        return status not in (401, 403) and status < 500
    return status == (403 if routes else 401)


def _status(url, ca, route, token, request_id=None):
    method, path = route.split(" ")
    context = ssl.create_default_context(cafile=ca)
    host, port = urlsplit(url).hostname, urlsplit(url).port
    connection = http.client.HTTPSConnection(host, port, context=context, timeout=WAIT_S)
    headers = {"Content-Type": "application/json"}
    headers |= {} if token is None else {"Authorization": f"Bearer {token}"}
    headers |= {} if request_id is None else {"X-Request-Id": request_id}
    body = b'{"prompt": [1, 2], "max_tokens": 1}' if method == "POST" else None
    try:
        connection.request(method, path, body=body, headers=headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 599
    finally:
        connection.close()


@pytest.mark.forge_check("security.audit_coverage")
def test_audit_coverage(subject, evidence, tmp_path):
    """Each request that was answered is in the audit log, once, with who asked and what came of it.

    The last one ends the server; that it did is on record too, as an action of who asked for it.
    Oracle: the statuses this side of the connection, by request id, and whose token was sent. A
    request that was not let in stands under nobody's name who was.
    """
    spec = subject.server(tmp_path, secured=True)
    if spec.audited is None or not spec.routes:
        pytest.skip("the server shows no audit log, or no route that needs a token (ServerSpec)")
    answered, asker = {}, {}
    holders = {**spec.tokens, "nobody": None}
    access = {**spec.access, "nobody": frozenset()}
    with started(spec.command) as target:
        for route in spec.routes:
            # Whoever may end the server asks last.
            for name in sorted(holders, key=lambda held: route in access[held]):
                request_id = f"audit-{len(answered)}"
                asker[request_id] = name
                answered[request_id] = _status(
                    target.url, spec.ca, route, holders[name], request_id
                )
        status = target.stop()
    evidence.equal("ended", status, expected=0, reason="what was recorded last is on disk")
    recorded = {}
    for entry in spec.audited():
        recorded.setdefault(entry.request_id, []).append(entry)
    missing = [name for name in answered if name not in recorded]
    twice = [name for name in answered if len(recorded.get(name, ())) > 1]
    held = {n: recorded[n] for n in answered if n in recorded}
    other = [n for n, entries in held.items() if [e.status for e in entries] != [answered[n]]]
    strange = [
        f"{asker[name]} as {entry.actor}"
        for name, entries in held.items()
        for entry in entries
        if not _is_actor(entry.actor, asker[name], access)
    ]
    evidence.record("requests", len(answered), unit="requests", reason="asked")
    covered = 1 - len(missing) / len(answered)
    evidence.record("audit_coverage", covered, reason=f"of {several(len(answered), 'request')}")
    for what, names in (
        ("missing", missing),
        ("twice", twice),
        ("other_status", other),
        ("other_actor", strange),
    ):
        evidence.equal(
            what, len(names), expected=0, unit="requests", reason=", ".join(names[:3]) or "none"
        )
    if spec.actions is None:
        evidence.record("end_recorded", "not held", reason="the subject shows requests alone")
        return
    last = asker[f"audit-{len(answered) - 1}"]
    actions = list(spec.actions())
    evidence.equal(
        "end_recorded",
        any(actor == last for actor, _ in actions),
        expected=True,
        reason=f"{last} ended the server; recorded: {', '.join(f'{a}: {w}' for a, w in actions)}",
    )


def _is_actor(recorded, asked, access):
    if access[asked]:
        return recorded == asked
    return recorded not in [name for name, routes in access.items() if routes]
