"""Connections held to limits: slow or large headers, clients that stop reading, too many at once.

A connection on which nothing is being answered waits for its client, and each such wait has an end.
uvicorn's own has not: it begins after the first answer only, and a byte of anything stops it, be it
of a body that nobody reads any more. Under overload it is here that refusals are written: the task
and the routing of each would cost more than all the rest of it. What offers another protocol
beside HTTP/1.1 is answered in HTTP/1.1; uvicorn would drop its body. A last answer that does not
wait for the body closes when the body has been there: bytes that nobody reads reset a connection
that closes, and a client that still sends would not see the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, ClassVar, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .exchange import Refusal, Reply, new_request_id
from .metrics import Metrics
from .problems import MALFORMED, Problem
from .settings import Settings

if TYPE_CHECKING:
    from asyncio import TimerHandle

    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from uvicorn._types import ASGI3Application
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

MAX_HEADER_BYTES = 65_536

_CLOSE = (b"connection", b"close")
_OFFER = (b"upgrade", b"http2-settings")
"""Headers, and words of `connection`, of a request that offers to go on in another protocol."""

# What a client may owe, by the setting that says how long.
_HEADERS = "header_s"
_REST = "body_s"
"""Of the body of a request that is answered."""
_REQUEST = "keep_alive_s"
"""The next one."""
_READING = "send_s"
"""The last answer."""

Door = Callable[["Scope"], Refusal | None]


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the limits; made for one server by `limited_protocol`."""

    settings: ClassVar[Settings]
    metrics: ClassVar[Metrics]
    _is_in_headers, _is_in_body = True, False
    _has_ended = _has_body = False
    """Whether a message ended in what is being parsed, and whether some of a body was in it."""
    _header_bytes = 0
    """Read since the last message began or the last of its body was there: headers, or trailers."""
    _is_last = False
    """Whether the connection closes once the rest of what was answered is there."""
    _owed: str | None = None
    _answered: RequestResponseCycle | None = None
    _until = 0.0
    _timer: TimerHandle | None = None
    _write_timer: TimerHandle | None = None

    @staticmethod
    def door(scope: Scope) -> Refusal | None:
        """Returns the refusal of a request that need not reach the application; None: it must."""
        return None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Counts the connection and starts waiting for headers."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self.metrics.refused_connections.inc()
            transport.abort()
            return
        self._wait_as_needed()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops waiting."""
        if self._timer is not None:
            self._timer.cancel()
        self._is_read_again()
        super().connection_lost(exc)
        # uvicorn tells the newest request alone; of several in a row an older one is answered.
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Parses, and gives up on headers, or trailers, that do not end."""
        self._has_ended = self._has_body = False
        self._parse(data)
        # What came with a body, or with the end of a message, is not all of it headers; the next
        # read is.
        if not self._has_ended and not self._has_body:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._give_up()

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                # The parser takes the rest for the other protocol. HTTP lets a server pass over the
                # offer, which Java's client makes with every request: it is read without it.
                data = self._read_anew() + data[offer.args[0] :] if self._offers else b""
            except httptools.HttpParserError as error:
                self.logger.warning("Refused what is no HTTP: %s", error)
                self.send_400_response(str(error))
                return

    @property
    def _offers(self) -> bool:
        return any(name == b"upgrade" for name, _ in self.headers)

    def _should_upgrade(self) -> bool:
        # Asked of what the parser takes for an upgrade: nothing is begun before it is read again.
        return self._offers

    def _read_anew(self) -> bytes:
        """Returns the head of the request without its offer, for a new parser: one is set up."""
        line = (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        lines = [b"%s %s HTTP/%s" % line]
        for name, value in self.headers:
            if name == b"connection":
                words = (word.strip() for word in value.split(b","))
                value = b", ".join(word for word in words if word.lower() not in _OFFER)
            if name not in _OFFER:
                lines.append(b"%s: %s" % (name, value))
        # The old one reads nothing more after a request that was to be the last.
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_message_begin(self) -> None:
        """Starts waiting for the rest of the headers."""
        super().on_message_begin()
        self._is_in_headers, self._header_bytes = True, 0
        self._wait_as_needed()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a header; a trailer, which comes after the body, is none and says nothing."""
        if self._is_in_headers:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Takes a piece of the body."""
        self._has_body, self._header_bytes = True, 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """Hands the request on."""
        if self._is_last or (self.parser.should_upgrade() and self._offers):
            return
        self._is_in_headers, self._is_in_body = False, True
        super().on_headers_complete()
        self._wait_as_needed()

    def on_message_complete(self) -> None:
        """Stops waiting for a body, whether or not somebody reads it."""
        if self.parser.should_upgrade() and self._offers:
            return
        super().on_message_complete()
        self._is_in_body, self._has_ended = False, True
        if self._is_last:
            self.transport.close()
        self._wait_as_needed()

    def on_response_complete(self) -> None:
        """Starts waiting for what the client has to do next."""
        super().on_response_complete()
        self._unset_keepalive_if_required()  # any byte would stop it
        self._wait_as_needed()

    def shutdown(self) -> None:
        """Closes once what is being answered has been."""
        super().shutdown()
        self._wait_as_needed()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP, and closes."""
        # In the middle of an answer it would be taken for a part of it.
        is_between = self.cycle is None or self.cycle.response_complete
        if not self._is_last and (is_between or not self.cycle.response_started):
            request_id = new_request_id()
            reply = Reply.of(Problem(MALFORMED, "This is no HTTP/1.1; send a request."), request_id)
            self._write(Refusal(reply.status, reply.head(request_id), reply.body), is_last=True)
        self.transport.close()
        self._wait_as_needed()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        refusal = self.door(cast("Scope", cycle.scope))
        self._answered = cycle
        cycle.transport = cast("asyncio.Transport", _Transport(self, cycle))
        if refusal is None:
            is_old = cycle.scope["http_version"] == "1.0"
            super()._start_asgi_task(cycle, _without_chunks(cycle, app) if is_old else app)
            return
        # What is still to come of the request is then ignored, as after any early answer.
        cycle.response_started = cycle.response_complete = True
        is_last = not cycle.keep_alive or _CLOSE in refusal.head
        self._write(refusal, is_last=is_last, has_body=cycle.scope["method"] != "HEAD")
        if is_last:
            self.close_after(cycle)
        if self.pipeline and not is_last:
            # Not from here: each of thousands in a row would be begun inside the one before.
            self.loop.call_soon(self._begin_next)
        else:
            self.on_response_complete()

    def close_after(self, cycle: RequestResponseCycle) -> None:
        """Closes after an answer: now, or when the rest of its request has been there.

        Args:
            cycle: The request and its answer.
        """
        if cycle is self.cycle and self._is_in_body:
            self._is_last = True
        else:
            self.transport.close()

    def _begin_next(self) -> None:
        if not self.transport.is_closing():
            self.on_response_complete()

    def _write(self, refusal: Refusal, *, is_last: bool, has_body: bool = True) -> None:
        head = [*self.server_state.default_headers, *refusal.head]
        if is_last and _CLOSE not in head:
            head.append(_CLOSE)
        lines = b"".join(b"%s: %s\r\n" % header for header in head)
        phrase = HTTPStatus(refusal.status).phrase.encode()
        # After HEAD the length is told, and what comes next is the next answer.
        body = refusal.body if has_body else b""
        self.transport.write(b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (refusal.status, phrase, lines, body))

    def pause_writing(self) -> None:
        """Gives a client that stopped reading a while."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.settings.send_s, self._give_up)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._is_read_again()

    def _is_read_again(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _wait_as_needed(self) -> None:
        """Waits for what the client owes now; what it owed before gets no new time."""
        owed = self._what_is_owed()
        if owed is self._owed:
            return
        self._owed = owed
        if owed is not None:
            self._until = self.loop.time() + getattr(self.settings, owed)
            self._set_timer()

    def _what_is_owed(self) -> str | None:
        if self.transport.is_closing():
            return _READING
        if self._is_in_headers:
            return _HEADERS
        if not self.cycle.response_complete:
            return None  # It is the application's turn, which has limits of its own.
        return _REST if self._is_in_body else _REQUEST

    def _set_timer(self) -> None:
        # One that is early looks again. Stopping and starting one at each turn of each request
        # costs as much as the rest of a refusal.
        if self._timer is not None:
            if self._timer.when() <= self._until:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(self._until, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._owed is None:
            return
        if self.loop.time() < self._until:
            self._set_timer()
        elif self._owed is _REQUEST:
            # In order, for TLS; a client that has not read its last answer still has time to.
            self.transport.close()
            self._wait_as_needed()
        else:
            self._give_up()

    def _give_up(self) -> None:
        # Even one that is closing: it would do so only when the client has read all.
        self.transport.abort()


class _Transport:
    """A connection as uvicorn's answer to one request sees it."""

    def __init__(self, protocol: LimitedProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol, self._cycle = protocol, cycle
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        self._protocol.close_after(self._cycle)


def _without_chunks(cycle: RequestResponseCycle, app: ASGI3Application) -> ASGI3Application:
    """Returns the application for a client of HTTP/1.0, which would take chunks for the body.

    A body whose length is not known then ends with the connection; uvicorn would send chunks.
    """

    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        has_length = True

        async def unchunked(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = any(name == b"content-length" for name, _ in message["headers"])
                if not has_length:
                    cycle.chunked_encoding = False
            elif not has_length:
                cycle.expected_content_length = len(message["body"])
            await send(message)

        await cast("ASGIApp", app)(scope, receive, unchunked)

    return cast("ASGI3Application", plain)


def limited_protocol(
    settings: Settings, metrics: Metrics, door: Door = LimitedProtocol.door
) -> type[HttpToolsProtocol]:
    """Returns the protocol class of a server with these limits.

    Args:
        settings: The limits.
        metrics: Where connections that were refused are counted.
        door: See `LimitedProtocol.door`.
    """
    members = {"settings": settings, "metrics": metrics, "door": staticmethod(door)}
    return type("LimitedProtocol", (LimitedProtocol,), members)
