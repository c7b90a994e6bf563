"""The application: every request is identified, authorized, answered, recorded, counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from starlette.routing import Route as StarletteRoute
from starlette.routing import Router
from starlette.types import Message, Receive, Scope, Send

from forge_harness.security.access import PUBLIC, Permission, check_declared
from forge_harness.security.audit import AuditEvent, Decision

from .exchange import Exchange, Refusal, Reply
from .guard import Guard
from .health import Health, State
from .metrics import Metrics
from .problems import CANCELLED, INTERNAL, NOT_FOUND, WRONG_METHOD, Outcome, Problem
from .route import Route

_UNMATCHED = "unmatched"
"""Label of requests for no route: their paths are the client's, and would be labels for ever."""
_ANY = "*"
_DECISIONS = {
    Outcome.OK: Decision.ALLOW,
    Outcome.CLIENT_ERROR: Decision.ALLOW,
    Outcome.SHED: Decision.DENY,
}
_LONGEST_PATH = 200

_log = logging.getLogger(__name__)


class Application:
    """The ASGI application.

    Args:
        routes: What it answers.
        guard: Tokens, roles, audit.
        metrics: Counts.
        health: Of the server.

    Raises:
        SecurityError: A route declares no permission.
    """

    def __init__(
        self, routes: Sequence[Route], *, guard: Guard, metrics: Metrics, health: Health
    ) -> None:
        check_declared({f"{route.method} {route.path}": route.permission for route in routes})
        shared = (guard, metrics, health)
        self._endpoints = {route.path: _Endpoint(route, *shared) for route in routes}
        table = [StarletteRoute(path, each, methods=None) for path, each in self._endpoints.items()]
        # The router alone: middleware of Starlette would answer text, uncounted and unrecorded,
        # and an endpoint here lets no exception out.
        self._router = Router(table, redirect_slashes=False, default=_Endpoint(_nowhere(), *shared))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        await self._router(scope, receive, send)

    def refuse(self, scope: Scope) -> Refusal | None:
        """Returns the refusal a request would get before its body is read; None: it gets none.

        The short way: no task, no routing. What it says, and how it is
        counted, is what the application would say.
        """
        endpoint = self._endpoints.get(scope["path"])
        return None if endpoint is None else endpoint.refuse(scope)


class _Endpoint:
    """One route as an ASGI application."""

    def __init__(self, route: Route, guard: Guard, metrics: Metrics, health: Health) -> None:
        self._route, self._guard = route, guard
        self._metrics, self._health = metrics.of(route.path), health

    def refuse(self, scope: Scope) -> Refusal | None:
        if self._route.gate is None or self._guard.records:
            return None
        exchange = Exchange(scope, _unread, _unsent)
        try:
            self._pass(exchange)
        except Problem as problem:
            self._metrics.received.inc()
            reply = self._refusal(exchange, problem)
            exchange.is_closing = self._health.state is State.DRAINING
            self._metrics.ended(reply.status, reply.outcome, time.monotonic() - exchange.started)
            return Refusal(reply.status, exchange.head(reply), reply.body)
        except Exception:
            # It fails again on the long way, which logs it and answers with a problem.
            return None
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        self._metrics.received.inc()
        reply = Reply.of(Problem(CANCELLED, "The server stopped."), exchange.request_id)
        events = None
        try:
            reply = await self._reply(exchange)
            events = reply.events
            reply = await self._recorded(exchange, reply)
            exchange.is_closing |= self._health.state is State.DRAINING
            if reply.outcome is not Outcome.CANCELLED:
                await exchange.send(reply)
            if reply.events is not None:
                await self._stream(exchange, reply)
        finally:
            if events is not None:
                events.close()
            exchange.end()
            seconds = time.monotonic() - exchange.started
            self._metrics.ended(reply.code or reply.status, reply.outcome, seconds)

    async def _reply(self, exchange: Exchange) -> Reply:
        try:
            self._pass(exchange)
            return await self._route.handler(exchange)
        except Problem as problem:
            return self._refusal(exchange, problem)
        except Exception:
            _log.exception("Request %s failed", exchange.request_id)
            return self._refusal(exchange, _internal())

    def _pass(self, exchange: Exchange) -> None:
        """Lets a request through to its handler.

        Raises:
            Problem: It is not let through.
        """
        route, permission = self._route, self._route.permission
        assert permission is not None  # check_declared
        # The connection sends no body after HEAD.
        methods = ("GET", "HEAD") if route.method == "GET" else (route.method,)
        if route.method != _ANY and exchange.scope["method"] not in methods:
            raise Problem(
                WRONG_METHOD,
                f"{route.path} answers {' and '.join(methods)} only.",
                headers=(("allow", ", ".join(methods)),),
            )
        if permission != PUBLIC:
            self._guard.check_page(exchange.header("origin"), exchange.header("host"))
        exchange.principal = self._guard.principal(exchange.header("authorization"), permission)
        self._guard.require(exchange.principal, permission)
        if route.gate is not None:
            route.gate(exchange)

    def _refusal(self, exchange: Exchange, problem: Problem) -> Reply:
        if problem.kind.outcome is Outcome.SHED:
            self._metrics.shed(problem.reason)
        return Reply.of(problem, exchange.request_id)

    async def _recorded(self, exchange: Exchange, reply: Reply) -> Reply:
        """Records the request; the reply becomes another one when that fails."""
        if not self._route.action:
            return reply
        suffix = "" if reply.events is None else ".begin"
        try:
            await self._guard.record(_event(self._route, exchange, reply, suffix))
        except Problem as problem:
            return Reply.of(problem, exchange.request_id)
        return reply

    async def _stream(self, exchange: Exchange, reply: Reply) -> None:
        assert reply.events is not None
        async for chunk in reply.events:
            await exchange.send_body(chunk, is_last=False)
        last = reply.events.last()
        try:
            # The end is recorded before it is told.
            await self._guard.record(_event(self._route, exchange, reply, ".end"))
        except Problem as problem:
            last = reply.events.last(problem)
        await exchange.send_body(last, is_last=True)


def _event(route: Route, exchange: Exchange, reply: Reply, suffix: str) -> AuditEvent:
    decision = _DECISIONS.get(reply.outcome, Decision.ERROR)
    if reply.status in (401, 403):
        decision = Decision.DENY
    return AuditEvent(
        actor=exchange.principal.name,
        action=route.action + suffix,
        resource=exchange.path[:_LONGEST_PATH],
        decision=decision,
        request_id=exchange.request_id,
        detail={
            "status": reply.code or reply.status,
            "outcome": reply.outcome.value,
            "address": exchange.address,
            **reply.detail,
        },
    )


def _nowhere() -> Route:
    async def refuse(exchange: Exchange) -> Reply:
        raise Problem(NOT_FOUND, f"There is nothing at {exchange.scope['path'][:_LONGEST_PATH]!r}.")

    return Route(_UNMATCHED, _ANY, Permission("model", "describe"), refuse, "serve.unmatched")


async def _unread() -> Message:
    raise RuntimeError("A refusal does not read the body.")


async def _unsent(message: Message) -> None:
    raise RuntimeError("A refusal is written by the connection.")


def _internal() -> Problem:
    return Problem(INTERNAL, "The server failed on the request; its log says why.")
