"""Connections held to limits: slow or large headers, clients that stop reading, too many at once.

uvicorn times an idle connection only after its first answer, so one that never completes its
headers would hold a descriptor for ever. Under overload it is here that refusals are written: the
task and the routing of each would cost more than all the rest of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, ClassVar, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .exchange import Refusal
from .metrics import Metrics
from .settings import Settings

if TYPE_CHECKING:
    from asyncio import TimerHandle

    from starlette.types import Scope
    from uvicorn._types import ASGI3Application
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

MAX_HEADER_BYTES = 65_536

_CLOSE = (b"connection", b"close")

Door = Callable[["Scope"], Refusal | None]


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the limits; made for one server by `limited_protocol`."""

    settings: ClassVar[Settings]
    metrics: ClassVar[Metrics]
    _header_timer: TimerHandle | None = None
    _header_bytes = 0
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
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops waiting."""
        self._headers_are_there()
        self._is_read_again()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses, and gives up on headers that do not end."""
        super().data_received(data)
        if self._header_timer is not None:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._give_up()

    def on_message_begin(self) -> None:
        """Starts waiting for the rest of the headers."""
        # Not when bytes come: they may be the body of a request that was answered early.
        super().on_message_begin()
        if self._header_timer is None:
            self._expect_headers()

    def on_headers_complete(self) -> None:
        """Stops waiting, and hands the request on."""
        self._headers_are_there()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        refusal = self.door(cast("Scope", cycle.scope))
        if refusal is None:
            super()._start_asgi_task(cycle, app)
            return
        # What is still to come of the request is then ignored, as after any early answer.
        cycle.response_started = cycle.response_complete = True
        head = [*self.server_state.default_headers, *refusal.head]
        is_last = not cycle.keep_alive or _CLOSE in head
        if is_last and _CLOSE not in head:
            head.append(_CLOSE)
        lines = b"".join(b"%s: %s\r\n" % header for header in head)
        phrase = HTTPStatus(refusal.status).phrase.encode()
        self.transport.write(
            b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (refusal.status, phrase, lines, refusal.body)
        )
        if is_last:
            self.transport.close()
        self.on_response_complete()

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

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        self._header_timer = self.loop.call_later(self.settings.header_s, self._give_up)

    def _headers_are_there(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._headers_are_there()
        if not self.transport.is_closing():
            self.transport.abort()


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
